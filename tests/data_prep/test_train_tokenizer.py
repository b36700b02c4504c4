import subprocess
import sys
from pathlib import Path

import pytest

from anymixer.errors import UserError
from data_prep.train_tokenizer import SPECIAL_TOKENS, train_wordpiece

DOCUMENTS = [
    "The quick brown foxes jumped over lazy dogs; naïve café owners watched.",
    "Seven zebras quietly ate.",
] * 5


def test_special_tokens_come_first_and_wrap_the_text():
    tokenizer = train_wordpiece(lambda: DOCUMENTS, 300)
    assert tokenizer.convert_ids_to_tokens(list(range(5))) == list(SPECIAL_TOKENS)
    assert sorted(tokenizer.all_special_tokens) == sorted(SPECIAL_TOKENS)
    tokens = tokenizer.tokenize("The NAÏVE fox")
    assert tokenizer.convert_tokens_to_string(tokens) == "the naive fox"
    ids = tokenizer("the fox", "seven dogs")["input_ids"]
    assert ids[0] == 2 and ids[-1] == 3 and ids.count(3) == 2
    assert tokenizer.mask_token_id == 4 and tokenizer.pad_token_id == 0


def test_the_same_documents_give_the_same_tokenizer():
    # Another process has another order of its hash tables.
    program = "from test_train_tokenizer import DOCUMENTS; from data_prep.train_tokenizer import train_wordpiece; "
    program += "print(sorted(train_wordpiece(lambda: DOCUMENTS, 300).get_vocab().items()))"
    here = sorted(train_wordpiece(lambda: DOCUMENTS, 300).get_vocab().items())
    paths = [str(Path(__file__).parent), *sys.path]
    run = [sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r}; {program}"]
    assert subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip() == str(here)


def test_too_few_entries():
    with pytest.raises(UserError, match="--train_tokenizer: 100"):
        train_wordpiece(lambda: DOCUMENTS, 100)
