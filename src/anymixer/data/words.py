"""Which token ids begin a word and which continue one, by the tokenizer's own marks."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from anymixer.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# The bytes of white space as byte-level BPE writes them: tab, line feed, vertical tab, form feed, return, space.
_BYTE_LEVEL_SPACES = "ĉĊċČčĠ"
_METASPACE = "▁"


@dataclass(frozen=True)
class WordMarks:
    """What a vocabulary says of words, `[vocab]` each.

    continues: the token goes on with the word before it. closes: it ends in white space, so that what follows
    is a new word whatever it looks like.
    """

    continues: NDArray[np.bool_]
    closes: NDArray[np.bool_]

    def starts(self, token_ids: NDArray[np.int64], breaks: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Return where words begin, `[length]`.

        Args:
            token_ids: `[length]`.
            breaks: `[length]`, True where a word begins whatever the token: the first of a sequence, special
                tokens and what follows them.
        """
        starts = ~self.continues[token_ids] | breaks
        starts[1:] |= self.closes[token_ids[:-1]]
        starts[:1] = True
        return starts


def word_marks(tokenizer: PreTrainedTokenizerFast) -> WordMarks:
    """Return the marks of a tokenizer.

    WordPiece and some BPE write a prefix (`##`) before what continues a word; byte-level BPE and SentencePiece
    write the space before what begins one. Of byte-level tokens without a space, those that begin with a
    letter, a digit or a byte beyond ASCII continue a word; punctuation does not.

    Raises:
        UserError: the tokenizer marks words in no such way.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = list(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))))
    kinds = set(_kinds([backend["pre_tokenizer"], backend["decoder"], backend["model"]]))
    prefix = backend["model"].get("continuing_subword_prefix")
    nothing = np.zeros(len(tokens), np.bool_)
    if prefix:
        return WordMarks(np.array([token.startswith(prefix) for token in tokens]), nothing)
    if "ByteLevel" in kinds:
        continues = [(token[:1].isascii() and token[:1].isalnum()) or _is_byte(token[:1]) for token in tokens]
        closes = [token.endswith(tuple(_BYTE_LEVEL_SPACES)) for token in tokens]
        return WordMarks(np.array(continues), np.array(closes))
    if "Metaspace" in kinds:
        return WordMarks(np.array([not token.startswith(_METASPACE) for token in tokens]), nothing)
    raise UserError(
        "dataset.masking: this tokenizer does not mark which tokens continue a word (with ## or a leading space); "
        "use masking=bert or masking=all_mask"
    )


def _is_byte(character: str) -> bool:
    return bool(character) and ord(character) > 127 and character not in _BYTE_LEVEL_SPACES


def _kinds(part: Any) -> Iterator[str]:
    """Yield every `type` named in a nested description."""
    if isinstance(part, dict):
        if isinstance(part.get("type"), str):
            yield part["type"]
        part = [value for key, value in part.items() if key not in ("vocab", "merges")]
    if isinstance(part, list):
        for item in part:
            yield from _kinds(item)
