"""Samples of MDS shards as masked rows of token ids.

The masks of a row are a function of the seed, the row's number and the epoch, drawn where the row is read.
They depend neither on how many workers or ranks share the work nor on where a run was resumed. A row's number
is its place in the shards of all streams, one after the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any

import numpy as np
from numpy.typing import NDArray
from streaming import StreamingDataset
from streaming.base.dataset import _ShardState

from anymixer.data.masking import Masking
from anymixer.data.rows import RowReader, padded_row
from anymixer.data.streams import CheckedStream


class TextDataset(StreamingDataset):
    """Streams samples (`anymixer.data.rows`) as rows of `max_seq_len` tokens.

    A row is a dict of int64 arrays `[max_seq_len]`: `input_ids`, `attention_mask`, `labels` (-100 where
    nothing is predicted) and, where asked for, `sequence_id` (-1 for padding).

    A shard's hash is checked when this process first reads from it. Streaming does that only for shards it
    downloads or decompresses.

    Args:
        streams: where the shards are.
        seed: the seed of the masks.
        every_epoch_anew: masks change with the epoch (training); else a row has the same for ever (evaluation).
        numbered: rows have a `sequence_id`.
        check_hash: name of the hash to check, "auto" for the one the index records, None for none.
        options: arguments of `StreamingDataset`.
    """

    def __init__(
        self,
        *,
        streams: list[CheckedStream],
        reader: RowReader,
        masking: Masking,
        seed: int,
        every_epoch_anew: bool,
        pad_token_id: int,
        numbered: bool = False,
        check_hash: str | None = "auto",
        **options: Any,
    ) -> None:
        super().__init__(streams=streams, **options)
        self.reader = reader
        self.masking = masking
        self.seed = seed
        self.every_epoch_anew = every_epoch_anew
        self.pad_token_id = pad_token_id
        self.numbered = numbered
        self.between_epochs = False  # kept by the loader: it has passed the end of an epoch
        self._failure: BaseException | None = None
        self._checked_shards: set[int] = set()
        self._present_shards: set[int] = set()
        for number, stream in enumerate(streams):
            begin = int(self.shard_offset_per_stream[number])
            stream.choose_hash(self.shards[begin : begin + int(self.shards_per_stream[number])], check_hash)

    def get_item(self, sample_id: int, retry: int = 7) -> dict[str, NDArray[np.int64]]:
        """Return one masked row.

        Raises:
            UserError: the shard is damaged or missing, or the sample does not fit the tokenizer or the row.
        """
        shard_id = int(self.spanner[sample_id][0])
        self._check_shard(shard_id)
        try:
            sample = super().get_item(sample_id, retry)
        except RuntimeError:
            self._raise_failure()
            raise
        self._present_shards.add(shard_id)
        token_ids, starts = self.reader.read(sample)
        epoch = max(self.next_epoch - 1, 0) if self.every_epoch_anew else 0
        rng = np.random.default_rng((self.seed, int(sample_id), epoch))
        input_ids, labels = self.masking(token_ids, starts, rng)
        return padded_row(
            input_ids,
            labels,
            starts,
            length=self.reader.max_seq_len,
            pad_token_id=self.pad_token_id,
            numbered=self.numbered,
        )

    def __iter__(self) -> Iterator[dict[str, NDArray[np.int64]]]:
        """Yield the rows of this worker; see `StreamingDataset.__iter__`."""
        try:
            yield from super().__iter__()
            # Streaming ends the epoch early, as if it were over, when a thread that fetches shards has failed.
            self._raise_failure()
        finally:
            # Of an epoch that is left early, as most are: else its threads run on until the next one, or for
            # ever, and a worker forked meanwhile may never end, waiting for a lock that one of them held.
            if hasattr(self, "_iterator"):
                self._iterator.non_blocking_exit()

    def on_exception(self, future: Future) -> None:
        """Keep the error of a thread that fetches shards; see `StreamingDataset.on_exception`.

        Streaming raises it here, where nobody but the log hears it, and waits for ever for a thread that failed
        to say that it has ended.
        """
        error = future.exception()
        if error is not None:
            self._failure = error
            self._event.set()
            self._iterator.on_exit()

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Fetch a shard unless it is here; see `StreamingDataset.prepare_shard`.

        Streaming calls this for every sample it looks ahead to, and each time takes a lock file, which costs
        more than reading the sample. A shard once read from stays, unless the cache is limited.
        """
        if not blocking and not self.cache_limit and int(shard_id) in self._present_shards:
            return
        try:
            super().prepare_shard(shard_id, blocking)
        except Exception:
            # Else it is "being fetched" for ever, and other workers wait for it. This way each finds it missing
            # and says so. Streaming has no public name for it.
            self._shard_states[shard_id] = _ShardState.LOCAL
            raise

    def state_dict(self, num_samples: int, from_beginning: bool) -> dict[str, Any]:
        """Return the position to resume from; see `StreamingDataset.state_dict`.

        Streaming knows only the epoch begun last. Asked between two epochs, as by a checkpoint at the end
        of one, it would answer "sample 0 of the epoch just finished" and resuming would repeat that epoch.
        """
        state = super().state_dict(num_samples, from_beginning)
        if from_beginning and num_samples == 0 and self.between_epochs:
            state["epoch"] = self.next_epoch
        return state

    def pending_offset(self) -> int:
        """Return how many samples of the next epoch were read before a resumed run was stopped."""
        state = super().state_dict(0, False)
        return state["sample_in_epoch"] if state["epoch"] >= self.next_epoch else 0

    def _check_shard(self, number: int) -> None:
        """Raise UserError if the shard's file is here and damaged, the first time it is asked for."""
        if number not in self._checked_shards:
            self._checked_shards.add(number)
            stream = self.streams[int(self.stream_per_shard[number])]
            assert isinstance(stream, CheckedStream)
            stream.check(self.shards[number])

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure
