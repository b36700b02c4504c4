"""What a row is trained on: which tokens are hidden and predicted, chosen by name in the YAML file.

    masking: span
    masking: {name: bert, probability: 0.15, mask_share: 0.8, random_share: 0.1}

Every scheme chooses each ordinary token with the same probability, whatever the row, and never chooses a
special one. All draws come from the generator that is passed in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anymixer.data.words import WordMarks
from anymixer.errors import UserError
from anymixer.labels import IGNORED_LABEL
from anymixer.registry import Registry

Ids = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Vocabulary:
    """What masking needs to know of a tokenizer.

    special: `[vocab]`, True for tokens that are never chosen. words: called only by schemes that need it.
    """

    size: int
    mask_token_id: int
    special: Flags
    words: Callable[[], WordMarks]


class Masking:
    """Base of the schemes: choose tokens, hide most of them, label all of them.

    Of the chosen, `mask_share` become the mask token, `random_share` a token drawn from the whole vocabulary,
    and the rest stay (Devlin et al. 2019, section 3.1: 80, 10 and 10 %).
    """

    predicts_masks = True

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """probability: share of the tokens that is chosen; None: `mlm_probability`."""

        probability: float | None = None
        mask_share: float = 0.8
        random_share: float = 0.1

        def validate(self, key: str, mlm_probability: float) -> None:
            """Raise UserError, naming the key, for a value that is out of its range."""
            chosen = self.chosen_share(mlm_probability)
            if not 0 < chosen < 1:
                raise UserError(f"{key}.probability: {chosen} is not between 0 and 1")
            if self.mask_share < 0 or self.random_share < 0 or self.mask_share + self.random_share > 1:
                raise UserError(f"{key}.mask_share: with random_share it must stay between 0 and 1")

        def chosen_share(self, mlm_probability: float) -> float:
            """Return the share of the tokens that is chosen."""
            return mlm_probability if self.probability is None else self.probability

    def __init__(self, config: Any, mlm_probability: float, vocabulary: Vocabulary) -> None:
        """config: this class's `Config`, validated."""
        self.probability = config.chosen_share(mlm_probability)
        self.mask_share, self.random_share = config.mask_share, config.random_share
        self.vocabulary = vocabulary

    def __call__(self, token_ids: Ids, starts: Flags, rng: np.random.Generator) -> tuple[Ids, Ids]:
        """Return `(input_ids, labels)`, `[length]` each; a label is -100 where nothing is predicted.

        Args:
            token_ids: `[length]`, without padding.
            starts: `[length]`, True at the first token of every sequence of the row.
        """
        special = self.vocabulary.special[token_ids]
        chosen, unit = self.choose(token_ids, starts, special, rng)
        chosen &= ~special
        fate = rng.random(len(token_ids))[unit]
        replacement = rng.integers(self.vocabulary.size, size=len(token_ids))
        input_ids = token_ids.copy()
        input_ids[chosen & (fate < self.mask_share)] = self.vocabulary.mask_token_id
        replaced = chosen & (fate >= self.mask_share) & (fate < self.mask_share + self.random_share)
        input_ids[replaced] = replacement[replaced]
        return input_ids, np.where(chosen, token_ids, IGNORED_LABEL)

    def choose(
        self, token_ids: Ids, starts: Flags, special: Flags, rng: np.random.Generator
    ) -> tuple[Flags, Ids | slice]:
        """Return which tokens are chosen, and at which position lies the draw that decides each one's fate."""
        return rng.random(len(token_ids)) < self.probability, slice(None)


maskings: Registry[Masking] = Registry("masking", Masking)


@maskings.register("bert")
class BertMasking(Masking):
    """Each token alone; 80 % hidden, 10 % replaced, 10 % kept (Devlin et al. 2019)."""


@maskings.register("all_mask")
class AllMask(Masking):
    """Each token alone, always hidden by the mask token."""

    @dataclass(frozen=True, kw_only=True)
    class Config(Masking.Config):
        """The shares of `Masking.Config` at 1 and 0."""

        mask_share: float = 1.0
        random_share: float = 0.0


@maskings.register("neobert")
class NeoBertMasking(AllMask):
    """`all_mask` at 20 %, whatever `mlm_probability` says (Le Breton et al. 2025, section 3)."""

    @dataclass(frozen=True, kw_only=True)
    class Config(AllMask.Config):
        """`all_mask` with its own probability."""

        probability: float | None = 0.2


class _OfWords(Masking):
    """Chooses whole words."""

    def __init__(self, config: Any, mlm_probability: float, vocabulary: Vocabulary) -> None:
        super().__init__(config, mlm_probability, vocabulary)
        self.marks = vocabulary.words()

    def words(self, token_ids: Ids, starts: Flags, special: Flags) -> tuple[Ids, Flags]:
        """Return each token's word, numbered from 0, and which tokens begin a stretch of words.

        A stretch holds no special token and lies in one sequence.
        """
        breaks = starts | special
        breaks[1:] |= special[:-1]
        return np.cumsum(self.marks.starts(token_ids, breaks)) - 1, breaks


@maskings.register("whole_word")
class WholeWordMasking(_OfWords):
    """All tokens of a word or none; each chosen token hidden, replaced or kept by its own draw (BERT's code)."""

    def choose(
        self, token_ids: Ids, starts: Flags, special: Flags, rng: np.random.Generator
    ) -> tuple[Flags, Ids | slice]:
        """See `Masking.choose`."""
        word, _ = self.words(token_ids, starts, special)
        return (rng.random(len(token_ids)) < self.probability)[word], slice(None)


@maskings.register("span")
class SpanMasking(_OfWords):
    """Spans of whole words, of geometric length, each hidden, replaced or kept as one (SpanBERT).

    Joshi et al. 2020 (section 3.1) draw spans one after the other until enough is masked. Here chosen or not
    is a chain of two states along the words, whose stays are geometric as well: with probability `keep` a
    word has the state of the word before it, else a fresh one, chosen with `probability`. So every token has
    the same chance, spans end at special tokens and at the ends of sequences without a trace, and no loop is
    needed. SpanBERT clips at 10 words, which makes its mean 3.8; here the mean is given and nothing is clipped.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config(Masking.Config):
        """mean_length: of a span, in words."""

        mean_length: float = 3.8

        def validate(self, key: str, mlm_probability: float) -> None:
            """Raise UserError, naming the key, for a value that is out of its range."""
            super().validate(key, mlm_probability)
            shortest = 1 / (1 - self.chosen_share(mlm_probability))
            if self.mean_length < shortest:
                raise UserError(
                    f"{key}.mean_length: {self.mean_length} words are fewer than words chosen one by one give "
                    f"({shortest:.2f}); raise it, or use masking=whole_word"
                )

    def __init__(self, config: Any, mlm_probability: float, vocabulary: Vocabulary) -> None:
        super().__init__(config, mlm_probability, vocabulary)
        # A span ends with probability (1 - keep) (1 - probability), which is to be 1 / mean_length.
        self.keep = 1 - 1 / (config.mean_length * (1 - self.probability))

    def choose(
        self, token_ids: Ids, starts: Flags, special: Flags, rng: np.random.Generator
    ) -> tuple[Flags, Ids | slice]:
        """See `Masking.choose`."""
        word, breaks = self.words(token_ids, starts, special)
        place = np.arange(len(token_ids))
        first = np.flatnonzero(np.diff(word, prepend=-1))  # of each word
        drawn_anew = (rng.random(len(token_ids)) >= self.keep)[: len(first)] | breaks[first]
        source = np.maximum.accumulate(np.where(drawn_anew, place[: len(first)], 0))
        chosen = (rng.random(len(token_ids)) < self.probability)[source][word] & ~special
        begins = chosen & (breaks | ~np.concatenate([[False], chosen[:-1]]))
        return chosen, np.maximum.accumulate(np.where(begins, place, 0))


@maskings.register("causal_lm")
class CausalLM(Masking):
    """Nothing hidden: every token is predicted from those before it in its sequence.

    Labels are the ids themselves and the model shifts them, as in transformers. The first token of a sequence
    has label -100, so that no sequence of a packed row is predicted from its neighbour.
    """

    predicts_masks = False

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """It has no options."""

        def validate(self, key: str, mlm_probability: float) -> None:
            """Nothing can be wrong."""

        def chosen_share(self, mlm_probability: float) -> float:
            """Return the share of the tokens that is predicted."""
            return 1.0

    def __init__(self, config: Any, mlm_probability: float, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary

    def __call__(self, token_ids: Ids, starts: Flags, rng: np.random.Generator) -> tuple[Ids, Ids]:
        """See `Masking.__call__`; draws nothing."""
        return token_ids, np.where(starts, IGNORED_LABEL, token_ids)
