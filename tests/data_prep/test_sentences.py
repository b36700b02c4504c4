from itertools import pairwise

import numpy as np
import pytest
from tokenizers import Tokenizer, models

from anymixer.data import wordpiece_tokenizer
from data_prep.sentences import SentenceEnds

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.mark.parametrize(
    ("words", "sentences"),
    [
        ("he is here . she is too . end", ["he is here .", "she is too .", "end"]),
        ("is it ? yes ! so", ["is it ?", "yes !", "so"]),
        ("( he is . ) she", ["( he is . )", "she"]),
        ("it is 3 . 14 or j . k . rowling", ["it is 3 . 14 or j . k . rowling"]),
        ("at 3 . then", ["at 3 .", "then"]),
        ("end .", ["end ."]),
    ],
)
def test_wordpiece(words, sentences):
    entries = [*SPECIAL, *dict.fromkeys(words.split())]
    tokenizer = wordpiece_tokenizer({word: number for number, word in enumerate(entries)}).backend_tokenizer
    split = words.split()
    ids = np.array([entries.index(word) for word in split])
    borders = [0, *SentenceEnds(tokenizer).find(ids), len(ids)]
    found = [" ".join(split[begin:end]) for begin, end in pairwise(borders)]
    assert found == sentences


def test_byte_level():
    entries = ["ĠHe", ".", "Ġshe", "S", "ĠU", '."', "Ċ"]
    tokenizer = Tokenizer(models.WordLevel({entry: number for number, entry in enumerate(entries)}, unk_token="."))
    find = SentenceEnds(tokenizer).find
    assert find(np.array([0, 1, 2, 1])) == [2]  # its own end is no cut
    assert find(np.array([0, 4, 1, 3, 1, 2])) == []  # "U.S. she": after single letters
    assert find(np.array([0, 1, 6, 2])) == [2]


def test_ids_of_any_stored_type():
    tokenizer = Tokenizer(models.WordLevel({"ab": 0, ".": 1}, unk_token="."))
    for dtype in (np.uint16, np.uint32, np.int64):
        assert SentenceEnds(tokenizer).find(np.array([0, 1, 0, 1], dtype)) == [2]
