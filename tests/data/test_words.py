"""Word beginnings against the tokenizers' own offsets into the text."""

import numpy as np
import pytest

from anymixer.data.words import word_marks
from anymixer.errors import UserError

TEXT = "Unbelievable small dogs, the cats' houses; number 17 said: why?\nAnother naïve line."


def trained(model, trainer, pre_tokenizer, decoder):
    """A tokenizer of some kind, trained on a few words so that most words take several tokens."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(model)
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoder
    backend.train_from_iterator(["the cats said why number line another small"] * 3, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")


def byte_level():
    from tokenizers import decoders, models, pre_tokenizers, trainers

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, special_tokens=["[UNK]"])
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return trained(models.BPE(), trainer, split, decoders.ByteLevel())


def metaspace():
    from tokenizers import decoders, models, pre_tokenizers, trainers

    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=["[UNK]"])
    return trained(models.BPE(unk_token="[UNK]"), trainer, pre_tokenizers.Metaspace(), decoders.Metaspace())


def starts(tokenizer, text):
    token_ids = np.array(tokenizer.encode(text, add_special_tokens=False))
    breaks = np.zeros(len(token_ids), bool)
    return word_marks(tokenizer).starts(token_ids, breaks)


def test_wordpiece(tokenizer):
    own = tokenizer(TEXT, add_special_tokens=False).word_ids()
    expected = [place == 0 or own[place] != own[place - 1] for place in range(len(own))]
    assert starts(tokenizer, TEXT).tolist() == expected


def test_byte_level():
    tokenizer = byte_level()
    text = TEXT.replace("17", "seventeen")
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    expected = []
    for begin, end in encoding["offset_mapping"]:
        before, here = text[begin - 1 : begin], text[begin]
        inside = (before.isalpha() and here.isalpha()) or encoding["offset_mapping"].index((begin, end)) < len(expected)
        expected.append(not inside)
    assert starts(tokenizer, text).tolist() == expected


def test_metaspace():
    tokenizer = metaspace()
    text = "the small cats said another line"
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode(text, add_special_tokens=False))
    found = starts(tokenizer, text)
    assert found.sum() == 6 and all(token.startswith("▁") == bool(start) for token, start in zip(tokens, found))


def test_a_tokenizer_without_marks_is_refused():
    from tokenizers import models, pre_tokenizers, trainers

    trainer = trainers.WordLevelTrainer(special_tokens=["[UNK]"])
    tokenizer = trained(models.WordLevel(unk_token="[UNK]"), trainer, pre_tokenizers.Whitespace(), None)
    with pytest.raises(UserError, match=r"dataset\.masking: this tokenizer does not mark"):
        word_marks(tokenizer)
