"""Masking of tokens for masked-language-model training (Devlin et al. 2019, section 3.1)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from anymixer.labels import IGNORED_LABEL


def mask_tokens(
    token_ids: NDArray[np.int64],
    *,
    probability: float,
    mask_token_id: int,
    vocab_size: int,
    never_masked: NDArray[np.bool_],
    rng: np.random.Generator,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Choose tokens to predict and hide them.

    Each token is chosen with `probability`. Of the chosen, 80 % become the mask token, 10 % a token drawn
    from the whole vocabulary, 10 % stay, as in BERT.

    Args:
        token_ids: any shape.
        never_masked: same shape; True for special tokens and padding.
        rng: the only source of randomness; always the same number of draws, so nothing else moves with it.

    Returns:
        `(input_ids, labels)` shaped as `token_ids`; a label is `IGNORED_LABEL` where nothing is predicted.
    """
    chosen = (rng.random(token_ids.shape) < probability) & ~never_masked
    fate = rng.random(token_ids.shape)
    replacement = rng.integers(vocab_size, size=token_ids.shape)
    input_ids = token_ids.copy()
    hidden = chosen & (fate < 0.8)
    input_ids[hidden] = mask_token_id
    replaced = chosen & (fate >= 0.8) & (fate < 0.9)
    input_ids[replaced] = replacement[replaced]
    return input_ids, np.where(chosen, token_ids, IGNORED_LABEL)


def sequence_ids(
    token_ids: NDArray[np.int64],
    attention_mask: NDArray[np.int64],
    *,
    eos_token_id: int | None = None,
    bos_token_id: int | None = None,
) -> NDArray[np.int64]:
    """Number the sequences packed into a row, from 0; padding gets -1.

    A sequence ends with `eos_token_id` or begins with `bos_token_id`, whichever is given.

    Args:
        token_ids: `[length]`, before masking.
        attention_mask: `[length]`, 0 for padding.
    """
    if bos_token_id is not None:
        begins = np.cumsum(token_ids == bos_token_id)
        numbers = begins - begins[0]  # a row cut in the middle of a sequence begins with a number too
    else:
        ends = np.cumsum(token_ids == eos_token_id)
        numbers = np.concatenate([[0], ends[:-1]])
    return np.where(attention_mask == 1, numbers, -1)
