"""Trains BERT's kind of tokenizer, a lower-case WordPiece, on documents."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from anymixer.data import wordpiece_tokenizer
from anymixer.errors import UserError

if TYPE_CHECKING:
    from tokenizers.normalizers import Normalizer
    from transformers import PreTrainedTokenizerFast

# In this order, so that their ids are 0 to 4.
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_SMALLEST = 256
_LARGEST_ALPHABET = 1000


def train_wordpiece(documents: Callable[[], Iterable[str]], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a WordPiece tokenizer with BERT's normalizer (lower case, no accents) and pre-tokenizer.

    The same documents give the same tokenizer. It may have fewer entries than `vocab_size` when they are few.

    Args:
        documents: starts reading the documents from the beginning; called twice.

    Raises:
        UserError: `vocab_size` is too small to hold the letters and the special tokens.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    if vocab_size < _SMALLEST:
        raise UserError(f"--train_tokenizer: {vocab_size} entries are too few; use at least {_SMALLEST}")
    backend = Tokenizer(models.WordPiece({}, unk_token="[UNK]", max_input_chars_per_word=100))
    normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.normalizer = normalizer  # pyright: ignore[reportAttributeAccessIssue]
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = _alphabet(documents(), normalizer, limit=min(_LARGEST_ALPHABET, vocab_size // 8))
    # The trainer numbers the "##x" forms of letters in the order of a hash table, another one each time, and
    # settles ties between merges by number. Given as special tokens they keep their places.
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL_TOKENS, *(f"##{letter}" for letter in alphabet)],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    backend.train_from_iterator(documents(), trainer)
    return wordpiece_tokenizer(backend.get_vocab())


def _alphabet(documents: Iterable[str], normalizer: Normalizer, *, limit: int) -> list[str]:
    """Return the most frequent letters in code order."""
    counts: Counter[str] = Counter()
    for document in documents:
        counts.update(normalizer.normalize_str(document))
    letters = [letter for letter in counts if not letter.isspace()]
    return sorted(sorted(letters, key=lambda letter: (-counts[letter], letter))[:limit])
