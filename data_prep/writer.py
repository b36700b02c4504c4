"""Writes the documents of one split of one unit as MDS shards: texts, or rows of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from data_prep.packing import BestFitRows, Cutting, add_document
from data_prep.sentences import sentence_ends
from data_prep.tokenizing import Vocabulary

Ids = NDArray[np.unsignedinteger]


@dataclass
class SplitCounts:
    """What a split holds.

    Args:
        documents: those written; `filtered` were too short or too long, `duplicates` came before.
        text_bytes: UTF-8 bytes of the documents written.
        rows: samples of the shards.
        sequences: documents, or pieces of them, that have their own special tokens; 0 where rows have them.
        cut: documents in several pieces.
        tokens: ids in the rows, with special ones; `document_tokens` are those of the documents.
        dropped_tokens: those of documents that did not fill a last row of concatenated ones.
        positions: rows times their length.
    """

    documents: int = 0
    filtered: int = 0
    duplicates: int = 0
    text_bytes: int = 0
    rows: int = 0
    sequences: int = 0
    cut: int = 0
    tokens: int = 0
    document_tokens: int = 0
    dropped_tokens: int = 0
    positions: int = 0

    def add(self, other: SplitCounts) -> None:
        """Add the counts of another part of the split."""
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


class SplitWriter(Protocol):
    """Takes the documents of a split; `token_counts` `[vocab]` counts its tokens but the special ones."""

    counts: SplitCounts
    token_counts: NDArray[np.int64]

    def write(self, documents: Sequence[str], ids: Sequence[Ids]) -> None:
        """Add documents and their ids (none for texts)."""
        ...

    def finish(self) -> None:
        """Write what is left and the index."""
        ...


@dataclass(frozen=True)
class RowFormat:
    """What a sample is: `mode` "text", "concatenated", "packed" or "sequences", and the tokens of a row."""

    mode: str
    row_tokens: int | None = None
    compression: str | None = None

    def writer(self, folder: Path, vocabulary: Vocabulary | None) -> SplitWriter:
        """Return a writer of such samples; it needs a vocabulary for all but texts."""
        if self.row_tokens is None or vocabulary is None:
            return TextWriter(folder, self.compression)
        if self.mode == "concatenated":
            return ConcatenatedWriter(folder, vocabulary, self.row_tokens, self.compression)
        together = self.mode == "packed"
        return PackedWriter(folder, vocabulary, self.row_tokens, self.compression, together=together)


class TextWriter:
    """One sample a document: `{"text": str}`. The loader tokenizes, cuts and pads it (MosaicBERT's way)."""

    def __init__(self, folder: Path, compression: str | None = None) -> None:
        from data_prep.shards import open_shards

        self.counts = SplitCounts()
        self.token_counts = np.zeros(0, np.int64)
        self._shards = open_shards(folder, {"text": "str"}, compression)

    def write(self, documents: Sequence[str], ids: Sequence[Ids] = ()) -> None:
        """Add documents."""
        for document in documents:
            self._shards.write({"text": document})
        _count_documents(self.counts, documents)
        self.counts.rows += len(documents)

    def finish(self) -> None:
        """Write the last shard and the index."""
        self._shards.finish()


class ConcatenatedWriter:
    """Rows of exactly `length` token ids: `{"tokens": uint16 or uint32 array}`.

    A row is the beginning token, `length - 2` tokens of the documents' stream, the ending token. In the stream,
    documents follow one another, each closed by the ending token. What does not fill a last row is left out.
    """

    def __init__(self, folder: Path, vocabulary: Vocabulary, length: int, compression: str | None = None) -> None:
        from data_prep.shards import open_shards

        self.counts = SplitCounts()
        self.token_counts = np.zeros(vocabulary.size, np.int64)
        self._special = list(vocabulary.special)
        self._begin = np.array(vocabulary.bos, vocabulary.dtype)
        self._end = np.array(vocabulary.eos, vocabulary.dtype)
        self._length = length
        self._left = np.zeros(0, vocabulary.dtype)
        self._shards = open_shards(folder, {"tokens": f"ndarray:{vocabulary.dtype.name}:{length}"}, compression)

    def write(self, documents: Sequence[str], ids: Sequence[Ids]) -> None:
        """Add documents: write the rows they fill."""
        pieces = [self._left]
        for document in ids:
            pieces += [document, self._end]
        stream = np.concatenate(pieces)
        body = self._length - len(self._begin) - len(self._end)
        rows = len(stream) // body
        self._left = stream[rows * body :]
        for row in stream[: rows * body].reshape(rows, body):
            self._shards.write({"tokens": np.concatenate([self._begin, row, self._end])})
        counts = np.bincount(stream[: rows * body], minlength=len(self.token_counts))
        counts[self._special] = 0
        self.token_counts += counts
        _count_documents(self.counts, documents)
        self.counts.rows += rows
        self.counts.tokens += rows * self._length
        self.counts.positions += rows * self._length
        self.counts.document_tokens += sum(map(len, ids))

    def finish(self) -> None:
        """Write the last shard and the index."""
        self.counts.dropped_tokens = len(self._left)
        self._shards.finish()


class PackedWriter:
    """Rows of whole sequences: `{"tokens": uint16 or uint32 array, "lengths": uint16 or uint32 array}`.

    A sequence is a document, or a piece of one that is longer than a row, with its own special tokens. A row
    holds sequences one after the other, `lengths` tokens each, together no more than `length`: what is missing
    is padding and is not stored. Rows are written as they are finished, not shuffled.

    Args:
        together: pack several sequences into a row; else each has a row of its own, in the documents' order.
    """

    def __init__(
        self,
        folder: Path,
        vocabulary: Vocabulary,
        length: int,
        compression: str | None = None,
        *,
        together: bool = True,
    ) -> None:
        from data_prep.shards import PackedShards

        self.counts = SplitCounts()
        self.token_counts = np.zeros(vocabulary.size, np.int64)
        self._special = list(vocabulary.special)
        self._dtype = vocabulary.dtype
        self._begin, self._end = (np.array(ids, self._dtype).tobytes() for ids in (vocabulary.bos, vocabulary.eos))
        self._lengths_dtype = np.dtype(np.uint16 if length < 1 << 16 else np.uint32)
        self._cutting = Cutting(length, len(vocabulary.bos) + len(vocabulary.eos))
        # A row that may not be added to is finished with its first piece.
        smallest = self._cutting.special_tokens + 1 if together else length
        self._rows: BestFitRows[bytes] = BestFitRows(length, smallest=smallest)
        self._sentence_ends = sentence_ends(vocabulary.tokenizer)
        self._shards = PackedShards(folder, self._dtype, self._lengths_dtype, compression)

    def write(self, documents: Sequence[str], ids: Sequence[Ids]) -> None:
        """Add documents: write the rows they finish."""
        for document in ids:
            self._add(document)
        counts = np.bincount(np.concatenate(ids), minlength=len(self.token_counts))
        counts[self._special] = 0
        self.token_counts += counts
        self.counts.document_tokens += sum(map(len, ids))
        _count_documents(self.counts, documents)

    def finish(self) -> None:
        """Write the rows still open, the last shard and the index."""
        for row in self._rows.finish():
            self._write_row(row)
        self._shards.finish()

    def _add(self, ids: Ids) -> None:
        long = len(ids) > self._cutting.longest
        values, width = ids.tobytes(), self._dtype.itemsize

        def sequence(start: int, end: int) -> bytes:
            return b"".join((self._begin, values[start * width : end * width], self._end))

        ends = self._sentence_ends.find(ids) if long else ()
        self.counts.cut += long
        for row in add_document(self._rows, self._cutting, sequence, len(ids), ends):
            self._write_row(row)

    def _write_row(self, sequences: list[bytes]) -> None:
        tokens = b"".join(sequences)
        lengths = np.array([len(sequence) // self._dtype.itemsize for sequence in sequences], self._lengths_dtype)
        sample: dict[str, Any] = {"tokens": tokens, "lengths": lengths.tobytes()}
        self._shards.write(sample)
        self.counts.rows += 1
        self.counts.sequences += len(sequences)
        self.counts.tokens += len(tokens) // self._dtype.itemsize
        self.counts.positions += self._cutting.row_length


def _count_documents(counts: SplitCounts, documents: Sequence[str]) -> None:
    counts.documents += len(documents)
    counts.text_bytes += sum(len(document.encode()) for document in documents)
