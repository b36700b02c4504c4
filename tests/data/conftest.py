"""A small corpus, its tokenizer, and the same documents as shards of every kind that the loader reads.

Written with streaming's own MDSWriter, so that these tests do not depend on how `data_prep` converts.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

WORDS = "the cat sat on a mat while seven small dogs ran over green hills and nobody said why they did so"
LENGTH = 32  # tokens in a row
SPLITS = {"train": range(320), "val": range(320, 400)}


def document(number: int) -> str:
    """A document of 20 to 60 words, different from all others."""
    words = WORDS.split()
    text = [words[(number * 7 + place * (1 + number % 5)) % len(words)] for place in range(20 + number % 41)]
    return " ".join(text) + f" number {number} ."


def write_split(folder: Path, columns: dict[str, str], samples: list[dict[str, Any]], **options: Any) -> None:
    """Write samples as MDS shards."""
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns=columns, hashes=["xxh64"], **options) as writer:
        for sample in samples:
            writer.write(sample)


def write_manifest(folder: Path, tokenizer: Any, **facts: Any) -> None:
    """Write what data_prep writes of its tokenizer, and the tokenizer."""
    from anymixer.data import tokenizer_fingerprint

    made_with = {"name": "tokenizer", "fingerprint": tokenizer_fingerprint(tokenizer), "vocab_size": len(tokenizer)}
    (folder / "manifest.json").write_text(json.dumps({"tokenizer": made_with, **facts}))
    tokenizer.save_pretrained(folder / "tokenizer")


def full_rows(tokenizer: Any, numbers: range) -> list[dict[str, Any]]:
    """Documents one after the other, each ended by [SEP], cut every `LENGTH` tokens."""
    stream = [id for n in numbers for id in [*tokenizer.encode(document(n), add_special_tokens=False), 3]]
    rows = np.array(stream[: len(stream) // LENGTH * LENGTH], np.uint16).reshape(-1, LENGTH)
    return [{"tokens": row} for row in rows]


def packed_rows(tokenizer: Any, numbers: range, length: int = LENGTH) -> list[dict[str, Any]]:
    """Pieces of documents, each [CLS] ... [SEP], as many in a row as fit in their order."""
    rows, row, lengths = [], [], []
    for n in numbers:
        body = tokenizer.encode(document(n), add_special_tokens=False)
        size = 5 + n % (length - 7)
        for begin in range(0, len(body), size):
            piece = [2, *body[begin : begin + size], 3]
            if len(row) + len(piece) > length:
                rows.append({"tokens": np.array(row, np.uint16), "lengths": np.array(lengths, np.uint16)})
                row, lengths = [], []
            row, lengths = [*row, *piece], [*lengths, len(piece)]
    return rows


@pytest.fixture(scope="session")
def writers():
    """The functions above, which test modules cannot import."""
    return {"split": write_split, "manifest": write_manifest, "packed": packed_rows, "full": full_rows}


@pytest.fixture(scope="session")
def tokenizer():
    """A WordPiece tokenizer with more than one token for most words."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    from anymixer.data import wordpiece_tokenizer

    backend = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, initial_alphabet=["##x"])
    backend.train_from_iterator([*map(document, range(400)), "x t h e xx"], trainer)
    words = sorted(backend.get_vocab().items(), key=lambda item: item[1])
    return wordpiece_tokenizer({word: number for number, (word, _) in enumerate(words)})


@pytest.fixture(scope="session")
def token_data(tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Full rows of 32 token ids, with their tokenizer."""
    out = tmp_path_factory.mktemp("tokens") / "data"
    for split, numbers in SPLITS.items():
        write_split(out / split, {"tokens": f"ndarray:uint16:{LENGTH}"}, full_rows(tokenizer, numbers))
    write_manifest(out, tokenizer, mode="concatenated", max_seq_len=LENGTH)
    return out


@pytest.fixture(scope="session")
def packed_data(tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed rows of up to 32 token ids in several shards."""
    out = tmp_path_factory.mktemp("packed") / "data"
    columns = {"tokens": "ndarray:uint16", "lengths": "ndarray:uint16"}
    for split, numbers in SPLITS.items():
        write_split(out / split, columns, packed_rows(tokenizer, numbers), size_limit=8192)
    write_manifest(out, tokenizer, mode="packed", max_seq_len=LENGTH)
    return out


@pytest.fixture(scope="session")
def text_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents as text."""
    out = tmp_path_factory.mktemp("texts") / "data"
    for split, numbers in SPLITS.items():
        write_split(out / split, {"text": "str"}, [{"text": document(n)} for n in numbers])
    return out


@pytest.fixture(autouse=True)
def workers_end_with_their_test(monkeypatch: pytest.MonkeyPatch):
    """End the workers of every loader that a test built.

    Composer's DataSpec refers to itself, so a loader lives until the garbage collector comes by; by then the
    queues to its workers are closed, and torch waits five seconds for each of them.
    """
    pytest.importorskip("composer")
    from anymixer.data.text_loader import TextLoader

    made = []
    construct = TextLoader.__init__

    def recorded(self, **options):
        made.append(self)
        construct(self, **options)

    monkeypatch.setattr(TextLoader, "__init__", recorded)
    yield
    for loader in made:
        if loader._iterator is not None:
            loader._iterator._shutdown_workers()
