"""Samples of MDS shards as masked rows of token ids.

The masks of a sample are a function of the seed, the sample's number and the epoch, drawn where the sample
is read. They depend neither on how many workers or ranks share the work nor on where a run was resumed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from streaming import StreamingDataset
from streaming.base.format import Reader

from anymixer.data.masking import mask_tokens, sequence_ids
from anymixer.data.shards import ShardFile
from anymixer.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Enough characters for a token, nearly always: a text is tokenized this far before all of it is.
_CHARS_PER_TOKEN = 8


@dataclass(frozen=True)
class MaskingOptions:
    """How tokens are chosen for prediction.

    `seed` and the sample's number fix the masks; with `every_epoch_anew` the epoch does too (training), and
    without it a sample has the same masks for ever (evaluation).
    """

    probability: float
    seed: int
    every_epoch_anew: bool


class TextDataset(StreamingDataset):
    """Streams `{"text": str}` or `{"tokens": array}` samples as rows of `max_seq_len` tokens.

    A row is a dict of int64 arrays `[max_seq_len]`: `input_ids`, `attention_mask`, `labels` (-100 where
    nothing is predicted) and, given `eos_token_id` or `bos_token_id`, `sequence_id` (-1 for padding). Text
    is tokenized on the fly, cut and padded; token ids must fill the row.

    A shard's hash is checked when this process first reads from it. Streaming does that only for shards it
    downloads or decompresses.

    Args:
        check_hash: name of the hash to check, "auto" for the one the index records, None for none.
        options: arguments of `StreamingDataset`.
    """

    def __init__(
        self,
        *,
        tokenizer: PreTrainedTokenizerFast,
        max_seq_len: int,
        masking: MaskingOptions,
        eos_token_id: int | None = None,
        bos_token_id: int | None = None,
        check_hash: str | None = "auto",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.tokenizer = tokenizer
        self.max_seq_len = max_seq_len
        self.masking = masking
        self.separators = {"eos_token_id": eos_token_id, "bos_token_id": bos_token_id}
        self.between_epochs = False  # kept by the loader: it has passed the end of an epoch
        self._vocab_size = len(tokenizer)
        self._pad_token_id = _id_of(tokenizer, "pad_token")
        self._mask_token_id = _id_of(tokenizer, "mask_token")
        self._never_masked = np.zeros(self._vocab_size, np.bool_)
        self._never_masked[tokenizer.all_special_ids] = True
        self._checked_shards: set[int] = set()
        self._present_shards: set[int] = set()
        self._choose_hashes(check_hash)

    def get_item(self, sample_id: int, retry: int = 7) -> dict[str, NDArray[np.int64]]:
        """Return one masked row.

        Raises:
            UserError: the shard is damaged, or the sample does not fit the tokenizer or the row.
        """
        shard_id = int(self.spanner[sample_id][0])
        self._check_shard(shard_id)
        token_ids, attention_mask = self._padded(self._token_ids(super().get_item(sample_id, retry)))
        self._present_shards.add(shard_id)
        epoch = max(self.next_epoch - 1, 0) if self.masking.every_epoch_anew else 0
        input_ids, labels = mask_tokens(
            token_ids,
            probability=self.masking.probability,
            mask_token_id=self._mask_token_id,
            vocab_size=self._vocab_size,
            never_masked=self._never_masked[token_ids],
            rng=np.random.default_rng((self.masking.seed, int(sample_id), epoch)),
        )
        row = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}
        if any(token_id is not None for token_id in self.separators.values()):
            row["sequence_id"] = sequence_ids(token_ids, attention_mask, **self.separators)
        return row

    def prepare_shard(self, shard_id: int, blocking: bool = True) -> None:
        """Fetch a shard unless it is here; see `StreamingDataset.prepare_shard`.

        Streaming calls this for every sample it looks ahead to, and each time takes a lock file, which costs
        more than reading the sample. A shard once read from stays, unless the cache is limited.
        """
        if self.cache_limit or int(shard_id) not in self._present_shards:
            super().prepare_shard(shard_id, blocking)

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

    def _token_ids(self, sample: dict[str, Any]) -> NDArray[np.int64]:
        if "text" in sample:
            return np.array(self._tokenize(sample["text"]), np.int64)
        tokens = sample["tokens"]
        # MosaicBERT's own conversion stores the bytes of int64 ids.
        token_ids = np.frombuffer(tokens, np.int64) if isinstance(tokens, bytes) else tokens.astype(np.int64)
        if len(token_ids) != self.max_seq_len:
            raise UserError(f"max_seq_len: a row of the data holds {len(token_ids)} tokens, not {self.max_seq_len}")
        largest = int(token_ids.max())
        if largest >= self._vocab_size:
            raise UserError(
                f"tokenizer_name: the data holds id {largest}, the tokenizer has {self._vocab_size} entries; "
                "use the tokenizer the data was converted with"
            )
        return token_ids

    def _tokenize(self, text: str) -> list[int]:
        """Return the first `max_seq_len` token ids, special tokens included; read no more than that takes."""
        limit = self.max_seq_len * _CHARS_PER_TOKEN
        cut = text.rfind(" ", 0, limit) if len(text) > limit else -1
        if cut > 0:
            # Words are tokenized one by one, so a text cut at a space begins with the same tokens.
            token_ids = self._encode(text[:cut])
            if len(token_ids) == self.max_seq_len:
                return token_ids
        return self._encode(text)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, truncation=True, max_length=self.max_seq_len)

    def _padded(self, token_ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the row and its attention mask, `[max_seq_len]` each."""
        padding = self.max_seq_len - len(token_ids)
        attention_mask = np.ones(self.max_seq_len, np.int64)
        if padding:
            attention_mask[-padding:] = 0
            token_ids = np.pad(token_ids, (0, padding), constant_values=self._pad_token_id)
        return token_ids, attention_mask

    def _choose_hashes(self, check_hash: str | None) -> None:
        """Set, per stream, the hash that both streaming and `_check_shard` verify."""
        for number, stream in enumerate(self.streams):
            wanted = stream.validate_hash or check_hash
            if wanted == "auto":
                begin = int(self.shard_offset_per_stream[number])
                shards = self.shards[begin : begin + int(self.shards_per_stream[number])]
                common = set.intersection(*(set(shard.hashes) for shard in shards))
                wanted = min(common) if common else None
            stream.validate_hash = wanted

    def _check_shard(self, number: int) -> None:
        """Raise UserError if the shard's file is here and damaged, the first time it is asked for."""
        if number in self._checked_shards:
            return
        self._checked_shards.add(number)
        shard: Reader = self.shards[number]
        algorithm = self.streams[int(self.stream_per_shard[number])].validate_hash
        for info, _ in shard.file_pairs:
            file = ShardFile(Path(shard.dirname, shard.split, info.basename), info.bytes, info.hashes)
            try:
                file.check_size()
                if algorithm is not None:
                    file.check_hash(algorithm)
            except FileNotFoundError:  # to be downloaded or decompressed: streaming checks that
                pass


def _id_of(tokenizer: PreTrainedTokenizerFast, role: str) -> int:
    """Return the id of the tokenizer's token for a role; UserError if it has none."""
    token_id = getattr(tokenizer, f"{role}_id")
    if not isinstance(token_id, int):
        raise UserError(f"tokenizer_name: the tokenizer has no {role}, which masked-language models need")
    return token_id
