import json
import multiprocessing
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from anymixer.data import load_tokenizer, read_manifest, tokenizer_fingerprint
from anymixer.entry_point import run
from anymixer.errors import UserError
from data_prep import convert as module
from data_prep.convert import ConvertOptions, convert, main, split_of
from data_prep.writer import token_dtype, unigram_cross_entropy

DOCUMENTS = [
    f"document {number} tells of {'many ' * (number % 9)}cats and of {number * 7} dogs." for number in range(300)
]


@pytest.fixture
def corpus(tmp_path) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(DOCUMENTS))
    return path


def options(corpus: Path, out: Path, **given) -> ConvertOptions:
    return ConvertOptions(**{"dataset": "text", "input": (corpus,), "out_root": out, "val_fraction": 0.2, **given})


def samples(folder: Path) -> list[dict]:
    from streaming.base.format import reader_from_json

    index = json.loads((folder / "index.json").read_text())
    readers = [reader_from_json(str(folder), None, shard) for shard in index["shards"]]
    return [reader[number] for reader in readers for number in range(len(reader))]


def test_texts_are_split_by_content(corpus, tmp_path):
    manifest = convert(options(corpus, tmp_path / "out"))
    train, val = ([sample["text"] for sample in samples(tmp_path / "out" / split)] for split in ("train", "val"))
    assert sorted(train + val) == sorted(DOCUMENTS) and len(val) > 20
    assert all(split_of(text, ("train", "val"), 0.2) == "val" for text in val)
    assert manifest == read_manifest(tmp_path / "out")
    assert manifest["splits"]["val"]["documents"] == len(val) and manifest["tokenizer"] is None
    hashes = json.loads((tmp_path / "out" / "train" / "index.json").read_text())["shards"][0]["raw_data"]["hashes"]
    assert list(hashes) == ["xxh64"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["manifest.json", "train", "val"]


def test_rows_are_full_and_hold_the_documents_in_order(corpus, tmp_path):
    manifest = convert(options(corpus, tmp_path / "out", train_tokenizer=300, concat_tokens=16))
    tokenizer = load_tokenizer(str(tmp_path / "out" / "tokenizer"))
    rows = np.stack([sample["tokens"] for sample in samples(tmp_path / "out" / "train")])
    assert rows.shape[1] == 16 and rows.dtype == np.uint16
    assert (rows[:, 0] == tokenizer.cls_token_id).all() and (rows[:, -1] == tokenizer.sep_token_id).all()
    stream = rows[:, 1:-1].reshape(-1).tolist()
    own = [text for text in DOCUMENTS if split_of(text, ("train", "val"), 0.2) == "train"]
    expected = [token for text in own for token in [*tokenizer.encode(text, add_special_tokens=False), 3]]
    assert stream == expected[: len(stream)] and len(expected) - len(stream) < 14
    facts = manifest["splits"]["train"]
    assert (facts["samples"], facts["tokens"], facts["documents"]) == (len(rows), rows.size, len(own))
    assert manifest["tokenizer"]["fingerprint"] == tokenizer_fingerprint(tokenizer)
    _, counts = np.unique(rows[rows > 4], return_counts=True)
    entropy = -(counts / counts.sum() * np.log(counts / counts.sum())).sum()
    assert manifest["unigram_entropy_nats"] == pytest.approx(entropy, abs=0.05)
    assert manifest["splits"]["val"]["unigram_cross_entropy_nats"] > entropy - 0.3


def test_a_conversion_is_reproducible(corpus, tmp_path):
    for name in ("a", "b"):
        convert(options(corpus, tmp_path / name, train_tokenizer=300, concat_tokens=16))
    for file in ("train/shard.00000.mds", "val/shard.00000.mds", "tokenizer/tokenizer.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_second_split_joins_the_first(corpus, tmp_path):
    out = tmp_path / "out"
    first = convert(options(corpus, out, splits=("train",), train_tokenizer=300, concat_tokens=16))
    name = str(out / "tokenizer")
    joined = convert(options(corpus, out, splits=("val",), tokenizer=name, concat_tokens=16))
    assert set(joined["splits"]) == {"train", "val"}
    assert joined["splits"]["val"]["documents"] == joined["splits"]["train"]["documents"] == len(DOCUMENTS)
    assert joined["unigram_entropy_nats"] == first["unigram_entropy_nats"]


def test_a_split_of_another_kind_does_not_join(corpus, tmp_path):
    out = tmp_path / "out"
    convert(options(corpus, out, splits=("train",), train_tokenizer=300, concat_tokens=16))
    with pytest.raises(UserError, match="another concat_tokens"):
        convert(options(corpus, out, splits=("val",), tokenizer=str(out / "tokenizer"), concat_tokens=32))
    assert not (out / "val").exists()


def test_nothing_is_overwritten(corpus, tmp_path):
    convert(options(corpus, tmp_path / "out"))
    before = (tmp_path / "out" / "manifest.json").read_bytes()
    with pytest.raises(UserError, match=r"out/train exists already; remove it or choose another --out_root"):
        convert(options(corpus, tmp_path / "out"))
    assert (tmp_path / "out" / "manifest.json").read_bytes() == before


def convert_slowly(given: ConvertOptions) -> None:
    def slow(*arguments, **more):
        for text in DOCUMENTS:
            time.sleep(0.05)
            yield text

    module.read_documents = slow
    module._BATCH_DOCUMENTS = 1
    convert(given)


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_a_killed_conversion_leaves_no_split_and_does_not_block_the_next(corpus, tmp_path):
    out = tmp_path / "out"
    process = multiprocessing.get_context("fork").Process(target=convert_slowly, args=(options(corpus, out),))
    process.start()
    deadline = time.monotonic() + 60
    while not list(out.glob(".tmp-*/train")):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    with pytest.raises(UserError, match="another conversion is writing"):
        convert(options(corpus, out))
    process.kill()
    process.join()
    assert not (out / "train").exists() and not (out / "manifest.json").exists()
    convert(options(corpus, out))
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "train", "val"]


def test_a_failed_conversion_leaves_nothing(tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\nnot json\n')
    with pytest.raises(UserError, match="line 2"):
        convert(options(bad, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"input": ()}, "--input: name the files"),
        ({"dataset": "demo"}, "--input: goes with --dataset text"),
        ({"concat_tokens": 16}, "--concat_tokens: needs --tokenizer"),
        ({"concat_tokens": 4, "train_tokenizer": 300}, "too few for a row"),
        ({"tokenizer": "x", "train_tokenizer": 300}, "give one of them"),
        ({"val_fraction": 1.5}, "--val_fraction: 1.5"),
        ({"compression": "zip"}, "--compression: unknown 'zip'"),
        ({"val_fraction": 1e-9}, "the val split got no document"),
        ({"train_tokenizer": 300, "concat_tokens": 4000}, r"the \w+ split fills no row of 4000 tokens"),
    ],
)
def test_impossible_options_are_named(corpus, tmp_path, given, message):
    with pytest.raises(UserError, match=message):
        convert(options(corpus, tmp_path / "out", **given))


def test_command_line(corpus, tmp_path, capsys):
    arguments = ["--dataset", "text", "--input", str(corpus), "--out_root", str(tmp_path / "out")]
    assert run(main, [*arguments, "--splits", "val", "train", "--val_fraction", "0.1"]) == 0
    assert "train: " in (shown := capsys.readouterr().out) and f"data_local={tmp_path / 'out'}" in shown
    assert run(main, arguments) == 2
    shown = capsys.readouterr()
    assert shown.err.startswith("error: --out_root") and shown.err.count("\n") == 1


def test_demo_corpus_is_a_dataset(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "demo_documents", lambda: iter(DOCUMENTS))
    given = ConvertOptions(dataset="demo", out_root=tmp_path / "out", train_tokenizer=300, concat_tokens=16)
    assert sum(facts["documents"] for facts in convert(given)["splits"].values()) == len(DOCUMENTS)


def test_stored_types():
    assert token_dtype(65_536) is np.uint16 and token_dtype(65_537) is np.uint32


def test_unigram_cross_entropy():
    counts = np.array([0, 10**6, 10**6])
    assert unigram_cross_entropy(counts, counts) == pytest.approx(np.log(2), abs=1e-5)
    assert np.isfinite(unigram_cross_entropy(np.array([5, 0, 0]), counts))
