"""The data loader of a `TextDataset`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from streaming import StreamingDataLoader

from anymixer.data.dataset import TextDataset
from anymixer.errors import UserError


class TextLoader(StreamingDataLoader):
    """A loader whose epochs are as long for any number of ranks, and end where its dataset can see it.

    Also gives a user's error in a worker process its one line back.

    Args:
        ranks: how many ranks share the batches.
        options: arguments of torch's `DataLoader`; the dataset is a `TextDataset`.
    """

    def __init__(self, *, ranks: int, **options: Any) -> None:
        super().__init__(**options)
        self.ranks = ranks

    def __len__(self) -> int:
        """Return the number of batches of an epoch begun at its first sample."""
        return self._batches(0) if self.drop_last else super().__len__()

    def __iter__(self) -> Iterator[Any]:
        dataset = self._text_dataset
        # Streaming repeats samples until every rank has as many, which may complete one batch more than the
        # data fills.
        limit = self._batches(dataset.pending_offset()) if self.drop_last else None
        epoch = self._epoch = object()
        dataset.between_epochs = False
        try:
            # Asks for a batch even where none is due, so that streaming counts the epoch.
            for number, batch in enumerate(super().__iter__()):
                if number == limit:
                    break
                yield batch
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
        return max(self._text_dataset.epoch_size - offset, 0) // (self.batch_size * self.ranks)
