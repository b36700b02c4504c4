"""Examples to batches: tokens, shuffling, rows of like length together, several sequences in a row where asked.

Nothing is cached: tokenizing takes seconds, and a cache would have to know the tokenizer, the length and the data.
"""

import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anymixer.errors import UserError
from anymixer.glue.data import Examples
from anymixer.labels import IGNORED_LABEL

if TYPE_CHECKING:
    from composer.core import DataSpec
    from transformers import PreTrainedTokenizerFast

Batch = dict[str, Tensor]
# Row lengths are rounded up to this, which suits matrix units.
_LENGTH_STEP = 8
# Batches whose examples are sorted by length together: enough that rows are of like length, few enough that which
# examples meet in a batch stays a matter of chance.
BUCKET_BATCHES = 32
_CHUNK = 10_000


@dataclass(frozen=True)
class Encoded:
    """Token ids and token types of all examples, one after the other, and where each begins.

    ids, types: [tokens]; starts: [examples + 1]; labels: [examples] or None.
    """

    ids: NDArray[np.int32]
    types: NDArray[np.uint8]
    starts: NDArray[np.int64]
    labels: NDArray[Any] | None

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example."""
        return np.diff(self.starts)


def encode(examples: Examples, tokenizer: "PreTrainedTokenizerFast", max_length: int) -> Encoded:
    """Tokenize; of texts that are too long together, the longer one loses its end.

    Raises UserError for a tokenizer that puts no tokens of its own around a text: there would be nothing to pool,
    and nothing between two texts.
    """
    pair = len(examples.texts) == 2
    if tokenizer.num_special_tokens_to_add(pair=pair) < 2:
        raise UserError("tokenizer_name: puts no tokens such as [CLS] and [SEP] around a text, which GLUE needs")
    # Threads of the tokenizer are safe here, where nothing forks while they run.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    ids, types, lengths = [], [], []
    for begin in range(0, len(examples), _CHUNK):
        columns: Any = [column[begin : begin + _CHUNK] for column in examples.texts]
        rows: Any = tokenizer(
            *columns, truncation=True, max_length=max_length, return_token_type_ids=True, return_attention_mask=False
        )
        lengths += [len(row) for row in rows["input_ids"]]
        ids.append(np.fromiter((token for row in rows["input_ids"] for token in row), np.int32))
        types.append(np.fromiter((kind for row in rows["token_type_ids"] for kind in row), np.uint8))
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Encoded(np.concatenate(ids), np.concatenate(types), starts, examples.labels)


def pad_token_id(tokenizer: "PreTrainedTokenizerFast") -> int:
    """What fills a row up; any token does where the tokenizer has none, because masks say what is real."""
    return tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else 0


class Batches:
    """The batches of one data set; each pass of a training set is shuffled anew, by (seed, pass).

    batch_size: examples a batch; one of a pass may be smaller. seed: None keeps everything in one order, which is
    `order`. row_length: several sequences share a row of at most so many tokens; None gives each a
    row, padded to the batch's longest. longest_row: what rounding up may not exceed.
    """

    def __init__(
        self,
        data: Encoded,
        batch_size: int,
        *,
        pad_token_id: int,
        longest_row: int,
        seed: int | None = None,
        row_length: int | None = None,
    ) -> None:
        self.data = data
        self.batch_size = batch_size
        self.pad_token_id = pad_token_id
        self.longest_row = longest_row
        self.seed = seed
        self.row_length = row_length
        self.passes = 0
        self._fixed = self._by_length()
        self.order = np.concatenate(self._fixed)

    def __len__(self) -> int:
        return -(-len(self.data) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        groups = self._fixed if self.seed is None else self.shuffled(self.seed, self.passes)
        self.passes += 1
        build = self._padded if self.row_length is None else self._packed
        return map(build, groups)

    def shuffled(self, seed: int, epoch: int) -> list[NDArray[np.int64]]:
        """The examples of each batch of one pass: shuffled, sorted by length within windows, batches shuffled.

        The last, smaller batch holds any examples, not the longest.
        """
        rng = np.random.default_rng([seed, epoch])
        shuffled = rng.permutation(len(self.data))
        whole = len(shuffled) // self.batch_size * self.batch_size
        window = self.batch_size * BUCKET_BATCHES
        groups = []
        for begin in range(0, whole, window):
            part = shuffled[begin : min(begin + window, whole)]
            part = part[np.argsort(self.data.lengths[part], kind="stable")]
            groups += np.split(part, range(self.batch_size, len(part), self.batch_size))
        mixed = [groups[place] for place in rng.permutation(len(groups))]
        return [*mixed, shuffled[whole:]] if whole < len(shuffled) else mixed

    def _by_length(self) -> list[NDArray[np.int64]]:
        """Examples of like length together; the batches in any order, so that the first few are a fair sample."""
        by_length = np.argsort(self.data.lengths, kind="stable")
        groups = np.split(by_length, range(self.batch_size, len(by_length), self.batch_size))
        return [groups[place] for place in np.random.default_rng(0).permutation(len(groups))]

    def _padded(self, group: NDArray[np.int64]) -> Batch:
        batch = self._rows([[example] for example in group.tolist()])
        del batch["sequence_id"]
        if self.data.labels is not None:
            batch["labels"] = torch.from_numpy(self.data.labels[group])
        return batch

    def _packed(self, group: NDArray[np.int64]) -> Batch:
        assert self.row_length is not None
        rows = pack(self.data.lengths, group.tolist(), self.row_length)
        batch = self._rows(rows)
        if self.data.labels is not None:
            labels, absent = self.data.labels, IGNORED_LABEL if self.data.labels.dtype == np.int64 else np.nan
            grid = np.full((len(rows), max(map(len, rows))), absent, dtype=labels.dtype)
            for row, members in zip(grid, rows):
                row[: len(members)] = labels[members]
            batch["labels"] = torch.from_numpy(grid)
        return batch

    def _rows(self, rows: list[list[int]]) -> Batch:
        """Rows of one or more examples each, padded to the longest."""
        lengths, starts = self.data.lengths, self.data.starts
        longest = max(int(lengths[members].sum()) for members in rows)
        length = min(-(-longest // _LENGTH_STEP) * _LENGTH_STEP, max(self.longest_row, longest))
        ids = np.full((len(rows), length), self.pad_token_id, dtype=np.int64)
        types, sequence = np.zeros_like(ids), np.full_like(ids, -1)
        for row, members in enumerate(rows):
            place = 0
            for number, example in enumerate(members):
                tokens, end = slice(starts[example], starts[example + 1]), place + int(lengths[example])
                ids[row, place:end], types[row, place:end] = self.data.ids[tokens], self.data.types[tokens]
                sequence[row, place:end] = number
                place = end
        named = {"input_ids": ids, "token_type_ids": types, "attention_mask": (sequence >= 0).astype(np.int64)}
        return {name: torch.from_numpy(values) for name, values in (named | {"sequence_id": sequence}).items()}


def pack(lengths: NDArray[np.int64], group: list[int], row_length: int) -> list[list[int]]:
    """Put examples into as few rows as first-fit decreasing needs; none is longer than a row."""
    rows: list[list[int]] = []
    room: list[int] = []
    for example in sorted(group, key=lambda example: (-lengths[example], example)):
        size = int(lengths[example])
        place = next((row for row, left in enumerate(room) if left >= size), None)
        if place is None:
            rows.append([])
            room.append(row_length)
            place = len(rows) - 1
        rows[place].append(example)
        room[place] -= size
    return rows


def data_spec(batches: Batches) -> "DataSpec":
    """The batches as Composer takes them: microbatches count by their labelled sequences."""
    from composer.core import DataSpec

    # What Composer says of an epoch's last batch, once for each of its sizes.
    warnings.filterwarnings("ignore", message="Cannot split tensor of length", category=UserWarning)
    return DataSpec(
        batches,
        num_samples=len(batches.data),
        get_num_samples_in_batch=_examples,
        get_num_tokens_in_batch=_tokens,
    )


def _examples(batch: Batch) -> int:
    if "labels" not in batch:
        return len(batch["input_ids"])
    from anymixer.models.sequence_classification import labelled_sequences

    return int(labelled_sequences(batch["labels"]).sum())


def _tokens(batch: Batch) -> dict[str, int]:
    """Tokens read, and what the loss is a mean over, under the name Composer has for it."""
    return {"total": int(batch["attention_mask"].sum()), "loss_generating": max(1, _examples(batch))}
