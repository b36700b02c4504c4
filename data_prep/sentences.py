"""Where sentences end, read from token ids: texts are long, and their ids are at hand anyway."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# The last four: an ellipsis, and the full stop, exclamation and question mark of Chinese and Japanese.
_FULL_STOPS = (".", "!", "?", "\u2026", "\u3002", "\uff01", "\uff1f")
_CLOSING = frozenset(")]\u201d\u2019\u00bb")  # with closing quotes
_SPACE_MARKS = ("Ġ", "▁", "Ċ")  # how byte-level BPE and SentencePiece write a space or line end before a word


class SentenceEnds:
    """Finds sentence ends in the ids of one tokenizer.

    A sentence ends after a token that ends with a full stop, and after the brackets and quotes that close it; not
    before a digit or the rest of a word ("3.14", "U.S."), nor after a single letter ("J. K. Rowling").
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        tokens = [tokenizer.id_to_token(number) or "" for number in range(tokenizer.get_vocab_size())]
        marked = any(token.startswith(("Ġ", "▁")) for token in tokens)
        bare = [token.lstrip("".join(_SPACE_MARKS)) for token in tokens]
        self._ends = np.array([text.rstrip("".join(_CLOSING)).endswith(_FULL_STOPS) for text in bare])
        self._closes = np.array([bool(text) and set(text) <= _CLOSING for text in bare])
        self._single = np.array([len(text) == 1 and text.isalpha() for text in bare])
        self._continues = np.array([_continues(token, marked) for token in tokens])

    def find(self, ids: NDArray[np.integer]) -> list[int]:
        """Return the positions right after a sentence of a document `[tokens]`, but for its own end, rising."""
        ends = self._ends[ids]
        ends[1:] &= ~self._single[ids[:-1]]
        closes = self._closes[ids]
        ends[1:] |= closes[1:] & ends[:-1]
        ends[:-1] &= ~(closes | self._continues[ids])[1:]
        return (np.flatnonzero(ends[:-1]) + 1).tolist()


@lru_cache(maxsize=1)
def sentence_ends(tokenizer: str) -> SentenceEnds:
    """Return the finder for a tokenizer in its serialized form; kept, because every unit asks for the same."""
    from tokenizers import Tokenizer

    return SentenceEnds(Tokenizer.from_str(tokenizer))


def _continues(token: str, marked: bool) -> bool:
    """Tell whether a token goes on with the word before it."""
    if marked:
        return not token.startswith(_SPACE_MARKS) and token[:1].isalnum()
    return token.startswith("##") or token[:1].isdigit()
