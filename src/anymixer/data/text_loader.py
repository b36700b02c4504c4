"""The data loader of a `TextDataset`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import torch
from streaming import StreamingDataLoader
from streaming.base.world import World
from torch import Tensor

from anymixer.data.dataset import TextDataset
from anymixer.errors import UserError
from anymixer.labels import IGNORED_LABEL

# Row lengths that are multiples of this suit matrix units, and keep the number of different lengths small.
_LENGTH_STEP = 8

Batch = dict[str, Tensor]


class TextLoader(StreamingDataLoader):
    """A loader whose epochs are as long for any number of ranks, and end where its dataset can see it.

    Also gives a user's error in a worker process its one line back.

    Args:
        bucket_batches: sort the rows of this many batches by length and cut each batch to its longest row;
            0 leaves them alone.
        options: arguments of torch's `DataLoader`; the dataset is a `TextDataset`.
    """

    def __init__(self, *, bucket_batches: int = 0, **options: Any) -> None:
        super().__init__(**options)
        self.world = World.detect()
        self.bucket_batches = bucket_batches

    def __len__(self) -> int:
        """Return the number of batches of an epoch begun at its first sample."""
        return self._batches(0) if self.drop_last else super().__len__()

    def __iter__(self) -> Iterator[Any]:
        dataset = self._text_dataset
        offset = dataset.pending_offset()
        epoch = self._epoch = object()
        dataset.between_epochs = False
        try:
            batches = self._whole(offset) if self.drop_last else self._without_repeats(offset)
            if self.bucket_batches:
                batches = by_length(batches, self.bucket_batches)
            yield from map(without_idle_mask, batches)
        except UserError as error:
            # From a worker process it comes wrapped in that process's stack trace.
            message = str(error).rstrip().splitlines()[-1]
            prefix = f"{UserError.__module__}.{UserError.__qualname__}: "
            raise UserError(message.removeprefix(prefix)) from error
        finally:
            # Also when Composer leaves early, having read as many batches as it was told to. The iterator of
            # an epoch may be collected only after the next one has begun.
            if self._epoch is epoch:
                dataset.between_epochs = True

    @property
    def _text_dataset(self) -> TextDataset:
        assert isinstance(self.dataset, TextDataset)
        return self.dataset

    def _batches(self, offset: int) -> int:
        """Return how many whole global batches follow the first `offset` samples of an epoch."""
        assert self.batch_size is not None
        return max(self._text_dataset.epoch_size - offset, 0) // (self.batch_size * self.world.num_ranks)

    def _whole(self, offset: int) -> Iterator[Batch]:
        """Yield whole global batches.

        Streaming repeats samples until every rank has as many, which may complete one batch more than the
        data fills.
        """
        limit = self._batches(offset)
        # Asks for a batch even where none is due, so that streaming counts the epoch.
        for number, batch in enumerate(super().__iter__()):
            if number == limit:
                break
            yield batch

    def _without_repeats(self, offset: int) -> Iterator[Batch]:
        """Yield all batches; the rows repeated so that every rank has as many have nothing to predict.

        So a metric over all ranks counts each row once, for any number of them.
        """
        distinct = self._distinct_rows() - offset
        seen = 0
        for batch in super().__iter__():
            row = seen + torch.arange(len(batch["labels"]))
            batch["labels"][places(row, self.world) >= distinct] = IGNORED_LABEL
            seen += len(row)
            yield batch

    def _distinct_rows(self) -> int:
        """Return how many places of an epoch hold rows that are not there only to even out the ranks' shares."""
        size, paths = self._text_dataset.epoch_size, self._text_dataset.num_canonical_nodes
        assert paths is not None, "build_loader sets it"
        # More paths than nodes are each filled up to the same length, in their own places.
        return size if paths <= self.world.num_nodes else paths * -(-size // paths)


def without_idle_mask(batch: Batch) -> Batch:
    """Drop the mask of a batch without padding: attention under a mask, whatever it says, is not flash attention."""
    mask = batch.get("attention_mask")
    return batch if mask is None or not mask.all() else {k: v for k, v in batch.items() if k != "attention_mask"}


def places(rows: Tensor, world: World) -> Tensor:
    """Return the places in the epoch's order of the rows of one rank, `[rows]`, counted from where it reads on.

    Streaming deals the epoch's rows out to the nodes, one by one, and each node's to its ranks.
    """
    return (rows * world.ranks_per_node + world.rank_of_node) * world.num_nodes + world.node


def by_length(batches: Iterable[Batch], window: int) -> Iterator[Batch]:
    """Regroup the rows of every `window` batches by their length; cut each batch to its longest row.

    The rows, and the sizes of the batches, stay as they are.
    """
    iterator = iter(batches)
    while chunk := list(islice(iterator, window)):
        merged = {name: torch.cat([batch[name] for batch in chunk]) for name in chunk[0]}
        lengths = merged["attention_mask"].sum(dim=1)
        order = lengths.argsort(stable=True)
        for rows in order.split([len(batch["labels"]) for batch in chunk]):
            longest = -(-int(lengths[rows].max()) // _LENGTH_STEP) * _LENGTH_STEP
            yield {name: values[rows, :longest] for name, values in merged.items()}
