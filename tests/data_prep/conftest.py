"""A tokenizer whose ids are the numbers in the text, so that what became of every word can be read from the rows."""

import json
from pathlib import Path

import pytest

WORDS = 30_000
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@pytest.fixture(scope="session")
def number_tokenizer(tmp_path_factory) -> str:
    """A tokenizer.json: the word "5" has id 5, and so on; the last special id is 4. Every tenth ends a sentence."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {**{token: i for i, token in enumerate(SPECIAL)}, **{word(i): i for i in range(5, WORDS)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return str(path)


def word(number: int) -> str:
    return f"x{number}." if number % 10 == 0 else f"x{number}"


@pytest.fixture(scope="session")
def text_of():
    """The text whose ids are the numbers from one up to another."""
    return lambda begin, end: " ".join(word(number) for number in range(begin, end))


@pytest.fixture(scope="session")
def read_samples():
    """All samples of a split's folder, in order, with streaming's own reader."""

    def read(folder: Path) -> list[dict]:
        from streaming.base.format import reader_from_json

        index = json.loads((folder / "index.json").read_text())
        readers = [reader_from_json(str(folder), None, shard) for shard in index["shards"]]
        return [reader[number] for reader in readers for number in range(len(reader))]

    return read


@pytest.fixture(scope="session")
def contents():
    """The files of a folder by name, so that two conversions can be compared byte by byte."""

    def read(folder: Path) -> dict[str, bytes]:
        files = (path for path in sorted(folder.rglob("*")) if path.is_file())
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}

    return read
