"""From a stored sample to the token ids of a row and where its sequences begin.

A sample is one of
    {"text": str}                       tokenized here, cut to the row's length (MosaicBERT's way)
    {"tokens": array}                   a full row: documents one after the other, wrapped at the row's end
    {"tokens": array, "lengths": array} a packed row: whole sequences with their special tokens, and their
                                        token counts; what is missing to the row's length is padding
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from anymixer.errors import UserError
from anymixer.labels import IGNORED_LABEL

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Enough characters for a token, nearly always: a text is tokenized this far before all of it is.
_CHARS_PER_TOKEN = 8


class RowReader:
    """Reads samples as rows of at most `max_seq_len` token ids.

    Args:
        eos_token_id, bos_token_id: in rows without `lengths`, the token that ends, or begins, each sequence.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast,
        max_seq_len: int,
        *,
        eos_token_id: int | None = None,
        bos_token_id: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.max_seq_len = max_seq_len
        self.eos_token_id, self.bos_token_id = eos_token_id, bos_token_id
        self._vocab_size = len(tokenizer)

    def read(self, sample: Mapping[str, Any]) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """Return token ids `[length]` and where sequences start, `[length]`.

        Raises:
            UserError: the sample does not fit the row or the tokenizer.
        """
        if "text" in sample:
            token_ids = np.array(self.tokenize(sample["text"]), np.int64)
            return token_ids, self._starts(token_ids)
        tokens = sample["tokens"]
        # MosaicBERT's own conversion stores the bytes of int64 ids.
        token_ids = np.frombuffer(tokens, np.int64) if isinstance(tokens, bytes) else tokens.astype(np.int64)
        lengths = sample.get("lengths")
        self._check(token_ids, lengths)
        return token_ids, self._starts(token_ids) if lengths is None else starts_of(lengths, len(token_ids))

    def tokenize(self, text: str) -> list[int]:
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

    def _starts(self, token_ids: NDArray[np.int64]) -> NDArray[np.bool_]:
        starts = np.zeros(len(token_ids), np.bool_)
        if self.bos_token_id is not None:
            starts = token_ids == self.bos_token_id
        elif self.eos_token_id is not None:
            starts[1:] = token_ids[:-1] == self.eos_token_id
        starts[:1] = True  # a row cut in the middle of a sequence begins with a part of it
        return starts

    def _check(self, token_ids: NDArray[np.int64], lengths: NDArray[Any] | None) -> None:
        held, largest = len(token_ids), int(token_ids.max(initial=0))
        if held > self.max_seq_len or (lengths is None and held < self.max_seq_len):
            raise UserError(f"max_seq_len: a row of the data holds {held} tokens, not {self.max_seq_len}")
        if lengths is not None and (int(lengths.sum()) != held or not lengths.all()):
            raise UserError(
                f"data_local: a packed row holds {held} tokens and its lengths say {int(lengths.sum())}; "
                "convert the data again"
            )
        if largest >= self._vocab_size:
            raise UserError(
                f"tokenizer_name: the data holds id {largest}, the tokenizer has {self._vocab_size} entries; "
                "use the tokenizer the data was converted with"
            )


def starts_of(lengths: NDArray[Any], total: int) -> NDArray[np.bool_]:
    """Return where sequences of these lengths begin in a row of `total` tokens, `[total]`."""
    starts = np.zeros(total, np.bool_)
    starts[np.cumsum(lengths.astype(np.int64)) - lengths] = True
    return starts


def padded_row(
    input_ids: NDArray[np.int64],
    labels: NDArray[np.int64],
    starts: NDArray[np.bool_],
    *,
    length: int,
    pad_token_id: int,
    numbered: bool,
) -> dict[str, NDArray[np.int64]]:
    """Return a row of the model's inputs, `[length]` each, padded at its end.

    `attention_mask` is 0 at padding, `labels` -100; with `numbered`, `sequence_id` counts the sequences of the
    row from 0 and is -1 at padding.
    """
    columns = {"input_ids": (input_ids, pad_token_id), "attention_mask": (np.ones_like(input_ids), 0)}
    columns["labels"] = (labels, IGNORED_LABEL)
    if numbered:
        columns["sequence_id"] = (np.cumsum(starts) - 1, -1)
    padding = length - len(input_ids)
    if not padding:
        return {name: values for name, (values, _) in columns.items()}
    return {name: np.concatenate([values, np.full(padding, pad)]) for name, (values, pad) in columns.items()}
