import gzip
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from anymixer.data import load_tokenizer, read_manifest, tokenizer_fingerprint
from anymixer.entry_point import run
from anymixer.errors import UserError
from data_prep import units
from data_prep.command_line import parse_options
from data_prep.convert import convert, main
from data_prep.manifest import unigram_cross_entropy
from data_prep.options import ConvertOptions
from data_prep.tokenizing import token_dtype
from data_prep.units import split_of

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


def test_texts_are_split_by_content(corpus, tmp_path, read_samples):
    manifest = convert(options(corpus, tmp_path / "out"))
    train, val = ([sample["text"] for sample in read_samples(tmp_path / "out" / split)] for split in ("train", "val"))
    assert sorted(train + val) == sorted(DOCUMENTS) and len(val) > 20
    assert all(split_of(text, ("train", "val"), 0.2) == "val" for text in val)
    assert manifest == read_manifest(tmp_path / "out")
    assert manifest["splits"]["val"]["documents"] == len(val) and manifest["tokenizer"] is None
    hashes = json.loads((tmp_path / "out" / "train" / "index.json").read_text())["shards"][0]["raw_data"]["hashes"]
    assert list(hashes) == ["xxh64"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["manifest.json", "train", "val"]


def test_rows_are_full_and_hold_the_documents_in_order(corpus, tmp_path, read_samples):
    manifest = convert(options(corpus, tmp_path / "out", train_tokenizer=300, concat_tokens=16))
    tokenizer = load_tokenizer(str(tmp_path / "out" / "tokenizer"))
    rows = np.stack([sample["tokens"] for sample in read_samples(tmp_path / "out" / "train")])
    assert rows.shape[1] == 16 and rows.dtype == np.uint16
    assert (rows[:, 0] == tokenizer.cls_token_id).all() and (rows[:, -1] == tokenizer.sep_token_id).all()
    stream = rows[:, 1:-1].reshape(-1).tolist()
    own = [text for text in DOCUMENTS if split_of(text, ("train", "val"), 0.2) == "train"]
    expected = [token for text in own for token in [*tokenizer.encode(text, add_special_tokens=False), 3]]
    assert stream == expected[: len(stream)] and len(expected) - len(stream) < 14
    facts = manifest["splits"]["train"]
    assert (facts["rows"], facts["tokens"], facts["documents"]) == (len(rows), rows.size, len(own))
    assert manifest["tokenizer"]["fingerprint"] == tokenizer_fingerprint(tokenizer)
    _, counts = np.unique(rows[rows > 4], return_counts=True)
    entropy = -(counts / counts.sum() * np.log(counts / counts.sum())).sum()
    assert manifest["unigram_entropy_nats"] == pytest.approx(entropy, abs=0.05)
    assert manifest["splits"]["val"]["unigram_cross_entropy_nats"] > entropy - 0.3


def test_a_conversion_is_reproducible(corpus, tmp_path, contents):
    for name in ("a", "b"):
        convert(options(corpus, tmp_path / name, train_tokenizer=300, concat_tokens=16))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


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
    with pytest.raises(UserError, match="another max_seq_len"):
        convert(options(corpus, out, splits=("val",), tokenizer=str(out / "tokenizer"), concat_tokens=32))
    assert not (out / "val").exists()


def test_what_others_made_is_not_overwritten(corpus, tmp_path):
    (tmp_path / "out" / "train").mkdir(parents=True)
    (tmp_path / "out" / "train" / "shard.00000.mds").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"out/train exists already; remove it or choose another --out_root"):
        convert(options(corpus, tmp_path / "out"))
    assert (tmp_path / "out" / "train" / "shard.00000.mds").read_bytes() == b"mine"


def test_a_complete_conversion_is_left_alone(corpus, tmp_path, capsys, contents):
    first = convert(options(corpus, tmp_path / "out"))
    before = contents(tmp_path / "out")
    assert convert(options(corpus, tmp_path / "out")) == first
    assert "complete already" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"train split with --compression None \(now zstd\)"):
        convert(options(corpus, tmp_path / "out", compression="zstd"))
    corpus.write_text("another text")
    with pytest.raises(UserError, match=r"train split with --input corpus.txt .* \(now corpus.txt"):
        convert(options(corpus, tmp_path / "out"))
    with pytest.raises(UserError, match="--splits \\['train', 'val'\\]"):
        convert(options(corpus, tmp_path / "out", splits=("train",)))
    assert contents(tmp_path / "out") == before


def test_packed_documents(tmp_path, number_tokenizer, text_of, read_samples):
    """The ids of the documents are 5, 6, 7, ...: every one is there once, and no sequence holds two documents."""
    generator = np.random.default_rng(0)
    borders = np.cumsum([5, *generator.geometric(1 / 40, 400)])
    documents = [text_of(*span) for span in pairwise(borders)]
    (tmp_path / "a.txt").write_text("\n\n".join(documents[:250]))
    records = (json.dumps({"text": text}) for text in documents[250:])
    (tmp_path / "b.jsonl").write_text("\n".join(records))
    given = options(tmp_path, tmp_path / "out", splits=("train",), tokenizer=number_tokenizer, pack_tokens=64)
    manifest = convert(given)
    assert manifest is not None
    rows = read_samples(tmp_path / "out" / "train")
    assert [shard_of["lengths"].dtype for shard_of in rows[:1]] == [np.uint16]
    sequences = []
    for row in rows:
        assert row["tokens"].dtype == np.uint16 and row["lengths"].sum() == len(row["tokens"]) <= 64
        ends = np.cumsum(row["lengths"].astype(int))
        sequences += [row["tokens"][end - length : end] for end, length in zip(ends, row["lengths"].astype(int))]
    assert all(sequence[0] == 2 and sequence[-1] == 3 for sequence in sequences)
    words = sorted((sequence[1:-1].tolist() for sequence in sequences), key=lambda own: own[0])
    assert [number for own in words for number in own] == list(range(5, borders[-1]))
    starts = {own[0] for own in words}
    assert starts >= set(borders[:-1].tolist())
    facts = manifest["splits"]["train"]
    assert facts["documents"] == 400 and facts["document_tokens"] == borders[-1] - 5
    assert facts["sequences"] == len(sequences) and facts["rows"] == len(rows) and facts["positions"] == len(rows) * 64
    assert facts["tokens"] == facts["document_tokens"] + 2 * len(sequences) > 0.97 * facts["positions"]
    assert facts["cut"] == sum(border - before > 62 for before, border in pairwise(borders))
    assert (manifest["mode"], manifest["max_seq_len"], manifest["dtype"]) == ("packed", 64, "uint16")
    assert [part["name"] for part in manifest["inputs"]] == ["a.txt", "b.jsonl"]
    assert manifest["inputs"][0]["bytes"] == (tmp_path / "a.txt").stat().st_size


def test_one_document_a_row(tmp_path, number_tokenizer, text_of, read_samples):
    (tmp_path / "a.txt").write_text("\n\n".join([text_of(5, 15), text_of(20, 60), text_of(70, 71)]))
    given = {"splits": ("train",), "tokenizer": number_tokenizer, "sequence_tokens": 32}
    assert convert(options(tmp_path / "a.txt", tmp_path / "out", **given))["mode"] == "sequences"
    rows = [row["tokens"].tolist() for row in read_samples(tmp_path / "out" / "train")]
    assert rows == [[2, *range(5, 15), 3], [2, *range(20, 50), 3], [2, *range(50, 60), 3], [2, 70, 3]]


def test_filters(corpus, tmp_path, read_samples):
    corpus.write_text(
        "\n\n".join(["short", "a text of some length", "short enough", "a text of some length", 99 * "x"])
    )
    given = {"splits": ("train",), "min_chars": 6, "max_chars": 50, "dedup": True}
    facts = convert(options(corpus, tmp_path / "out", **given))["splits"]["train"]
    texts = [sample["text"] for sample in read_samples(tmp_path / "out" / "train")]
    assert texts == ["a text of some length", "short enough"]
    assert (facts["documents"], facts["filtered"], facts["duplicates"]) == (2, 2, 1)


def test_local_files_of_a_corpus_with_splits_of_its_own(tmp_path, read_samples):
    for name, count in (
        ("c4-train.00000-of-00002", 3),
        ("c4-train.00001-of-00002", 2),
        ("c4-validation.00000-of-00001", 2),
    ):
        records = (json.dumps({"text": f"{name} {number}", "url": "x"}) for number in range(count))
        with gzip.open(tmp_path / f"{name}.json.gz", "wt") as file:
            file.write("\n".join(records))
    given = ConvertOptions(
        dataset="c4", input=(tmp_path,), out_root=tmp_path / "out", splits=("train", "val", "val_small")
    )
    facts = convert(given)["splits"]
    assert {split: of["documents"] for split, of in facts.items()} == {"train": 5, "val": 2, "val_small": 2}
    texts = [sample["text"] for sample in read_samples(tmp_path / "out" / "train")]
    assert texts[0] == "c4-train.00000-of-00002 0" and texts[-1] == "c4-train.00001-of-00002 1"


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
        ({"dataset": "txt"}, "--dataset: unknown 'txt'; did you mean 'text'"),
        ({"concat_tokens": 16}, "--concat_tokens: needs --tokenizer"),
        ({"concat_tokens": 4, "train_tokenizer": 300}, "too few for a row"),
        ({"tokenizer": "x", "train_tokenizer": 300}, "give one of them"),
        ({"val_fraction": 1.5}, "--val_fraction: 1.5"),
        ({"pack_tokens": 16}, "--pack_tokens: needs --tokenizer"),
        ({"pack_tokens": 16, "concat_tokens": 16, "tokenizer": "x"}, "--concat_tokens and --pack_tokens: give one"),
        ({"splits": ("train", "val_small")}, "--splits: val_small exist for c4"),
        ({"data_subset": "en"}, "--data_subset: names a part of a dataset on the Hugging Face Hub"),
        ({"min_chars": 9, "max_chars": 5}, "--min_chars: 9 is more than --max_chars 5"),
        ({"num_workers": 0}, "--num_workers: 0 is too small"),
        ({"shard": (2, 2)}, "--shard: 2/2"),
        ({"out_root": "ftp://x/y"}, "--out_root: ftp://x/y: give a folder, or a URL"),
        ({"train_tokenizer": 300, "concat_tokens": 8, "eos_text": "one two three four five"}, "too many for rows of 8"),
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
    assert run(main, arguments) == 2  # another --val_fraction
    shown = capsys.readouterr()
    assert shown.err.startswith("error: --out_root") and shown.err.count("\n") == 1
    for more in (["--shard", "one"], ["--pack_tokens", "many"], ["--tokenizr", "x"]):
        assert run(main, [*arguments, *more]) == 2
        assert (error := capsys.readouterr().err).startswith("error: ") and error.count("\n") == 1


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit):
        parse_options(["--help"])
    shown = capsys.readouterr().out
    assert shown.count("python -m data_prep.convert --dataset") == 4 and "--pack_tokens N" in shown


def test_demo_corpus_is_a_dataset(tmp_path, monkeypatch):
    monkeypatch.setattr(units, "demo_corpus", lambda: DOCUMENTS)
    given = ConvertOptions(dataset="demo", out_root=tmp_path / "out", train_tokenizer=300, concat_tokens=16)
    assert sum(facts["documents"] for facts in convert(given)["splits"].values()) == len(DOCUMENTS)


def test_stored_types():
    assert token_dtype(65_536) is np.uint16 and token_dtype(65_537) is np.uint32


def test_unigram_cross_entropy():
    counts = np.array([0, 10**6, 10**6])
    assert unigram_cross_entropy(counts, counts) == pytest.approx(np.log(2), abs=1e-5)
    assert np.isfinite(unigram_cross_entropy(np.array([5, 0, 0]), counts))
