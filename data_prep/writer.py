"""Writes the documents of one split as MDS shards: as text, or as rows of token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from streaming import MDSWriter
    from transformers import PreTrainedTokenizerFast

HASH = "xxh64"  # fast enough (GB/s) that readers can check every shard they open


@dataclass
class SplitSummary:
    """What a split holds. `token_counts` `[vocab]` counts its tokens but the special ones."""

    documents: int = 0
    text_bytes: int = 0
    samples: int = 0
    tokens: int = 0
    token_counts: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))


class SplitWriter(Protocol):
    """Takes the documents of a split."""

    summary: SplitSummary

    def write(self, documents: Sequence[str]) -> None:
        """Add documents."""
        ...

    def finish(self) -> SplitSummary:
        """Write what is left and the index; return the totals."""
        ...


class TextWriter:
    """One sample a document: `{"text": str}`. The loader tokenizes, cuts and pads it (MosaicBERT's way)."""

    def __init__(self, folder: Path, *, compression: str | None = None) -> None:
        self.summary = SplitSummary()
        self._shards = _open_shards(folder, {"text": "str"}, compression)

    def write(self, documents: Sequence[str]) -> None:
        """Add documents."""
        for document in documents:
            self._shards.write({"text": document})
        _count_documents(self.summary, documents)
        self.summary.samples += len(documents)

    def finish(self) -> SplitSummary:
        """Write the last shard and the index; return the totals."""
        self._shards.finish()
        return self.summary


class TokenWriter:
    """Rows of exactly `length` token ids: `{"tokens": uint16 or uint32 array}`.

    A row is the beginning token, `length - 2` tokens of the documents' stream, the ending token. In the
    stream, documents follow one another, each closed by `eos`. What does not fill a last row is left out.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: PreTrainedTokenizerFast,
        length: int,
        *,
        bos: Sequence[int],
        eos: Sequence[int],
        compression: str | None = None,
    ) -> None:
        self.dtype = token_dtype(len(tokenizer))
        self.summary = SplitSummary(token_counts=np.zeros(len(tokenizer), np.int64))
        self._backend = tokenizer.backend_tokenizer
        self._special = tokenizer.all_special_ids
        self._begin = np.array(bos, self.dtype)
        self._end = np.array(eos, self.dtype)
        self._length = length
        self._left = np.zeros(0, self.dtype)
        columns = {"tokens": f"ndarray:{self.dtype.__name__}:{length}"}
        self._shards = _open_shards(folder, columns, compression)

    def write(self, documents: Sequence[str]) -> None:
        """Tokenize documents, in parallel on all cores, and add the rows they fill."""
        pieces = [self._left]
        for encoding in self._backend.encode_batch_fast(list(documents), add_special_tokens=False):
            pieces += [np.array(encoding.ids, self.dtype), self._end]
        stream = np.concatenate(pieces)
        body = self._length - len(self._begin) - len(self._end)
        rows = len(stream) // body
        self._left = stream[rows * body :]
        for row in stream[: rows * body].reshape(rows, body):
            self._shards.write({"tokens": np.concatenate([self._begin, row, self._end])})
        counts = np.bincount(stream[: rows * body], minlength=len(self.summary.token_counts))
        counts[self._special] = 0
        _count_documents(self.summary, documents)
        self.summary.samples += rows
        self.summary.tokens += rows * self._length
        self.summary.token_counts += counts

    def finish(self) -> SplitSummary:
        """Write the last shard and the index; return the totals."""
        self._shards.finish()
        return self.summary


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """Return the smallest stored type that holds the ids of a vocabulary."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def unigram_cross_entropy(counts: NDArray[np.int64], model_counts: NDArray[np.int64]) -> float:
    """Return the nats per token of a text under the unigram model of another, smoothed by one count each.

    Args:
        counts: `[vocab]`, of the text predicted.
        model_counts: `[vocab]`, of the text the model knows. The same array gives the text's own entropy,
            but for the smoothing.
    """
    model = np.log((model_counts + 1) / (model_counts.sum() + len(model_counts)))
    return float(-(counts * model).sum() / max(int(counts.sum()), 1))


def _count_documents(summary: SplitSummary, documents: Sequence[str]) -> None:
    summary.documents += len(documents)
    summary.text_bytes += sum(len(document.encode()) for document in documents)


def _open_shards(folder: Path, columns: dict[str, str], compression: str | None) -> MDSWriter:
    from streaming import MDSWriter

    options: dict[str, Any] = {
        "out": str(folder),
        "columns": columns,
        "hashes": [HASH],
        "compression": compression,
    }
    return MDSWriter(**options)
