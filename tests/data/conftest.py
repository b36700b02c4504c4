"""A small corpus, its tokenizer, and the same text as token rows and as documents."""

from pathlib import Path

import pytest

from data_prep.convert import ConvertOptions, convert

WORDS = "the cat sat on a mat while seven small dogs ran over green hills and nobody said why they did so"


def make_documents(count: int) -> list[str]:
    """Return distinct documents of 20 to 60 words."""
    words = WORDS.split()
    return [
        " ".join(words[(number * 7 + place * (1 + number % 5)) % len(words)] for place in range(20 + number % 41))
        + f" number {number} ."
        for number in range(count)
    ]


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text file with blank lines between documents."""
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    path.write_text("\n\n".join(make_documents(400)))
    return path


@pytest.fixture(scope="session")
def token_data(corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of 32 token ids, with their tokenizer."""
    out = tmp_path_factory.mktemp("tokens") / "data"
    common = {"dataset": "text", "input": (corpus_file,), "out_root": out, "val_fraction": 0.2}
    convert(ConvertOptions(**common, train_tokenizer=300, concat_tokens=32))
    return out


@pytest.fixture(scope="session")
def text_data(corpus_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents as text."""
    out = tmp_path_factory.mktemp("texts") / "data"
    convert(ConvertOptions(dataset="text", input=(corpus_file,), out_root=out, val_fraction=0.2))
    return out


@pytest.fixture(scope="session")
def tokenizer(token_data: Path):
    """The tokenizer of `token_data`."""
    from anymixer.data import load_tokenizer

    return load_tokenizer(str(token_data / "tokenizer"))
