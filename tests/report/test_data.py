import json

import numpy as np
import pytest

from anymixer.errors import UserError
from anymixer.report.data import measure, report_data, summary

LENGTH = 64


def write(folder, columns, samples, **options):
    from streaming import MDSWriter

    with MDSWriter(out=str(folder), columns=columns, size_limit=4096, **options) as writer:
        for sample in samples:
            writer.write(sample)


def packed(rows):
    rng = np.random.default_rng(0)
    for _ in range(rows):
        cuts = np.sort(rng.choice(np.arange(1, LENGTH - 2), 3, replace=False))
        lengths = np.diff([0, *cuts, LENGTH - int(rng.integers(0, 2))])
        yield {"tokens": np.full(lengths.sum(), 7, np.uint16), "lengths": lengths.astype(np.uint16)}


@pytest.fixture(params=[None, "zstd"])
def folder(request, tmp_path):
    if request.param:
        pytest.importorskip("zstandard")
    columns = {"tokens": "ndarray:uint16", "lengths": "ndarray:uint16"}
    for split, rows in (("train", 200), ("val", 30)):
        write(tmp_path / "data" / split, columns, list(packed(rows)), compression=request.param)
    (tmp_path / "data" / "manifest.json").write_text(json.dumps({"mode": "packed", "max_seq_len": LENGTH}))
    return tmp_path / "data"


def test_packed_rows_are_counted_printed_and_drawn(folder, tmp_path, capsys):
    before = sorted(folder.rglob("*"))
    report_data(folder, tmp_path / "out")
    facts = json.loads((tmp_path / "out" / "data.json").read_text())["train"]
    rows = list(packed(200))
    every = np.concatenate([row["lengths"] for row in rows])
    assert facts["rows"] == facts["rows_measured"] == 200
    assert facts["real_share"] == pytest.approx(every.sum() / (200 * LENGTH))
    assert facts["sequences_per_row"] == 4.0
    assert facts["sequence_length"]["longest"] == every.max()
    assert facts["sequence_length"]["p50"] == int(np.median(every))
    out = capsys.readouterr().out
    assert "train" in out and "val" in out and f"{facts['real_share']:.2%}" in out
    assert (tmp_path / "out" / "rows.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(folder.rglob("*")) == before, "the data folder is left as it is"


def test_a_large_split_is_measured_in_part(folder, monkeypatch):
    monkeypatch.setattr("anymixer.report.data._MEASURED_ROWS", 50)
    sizes = measure(folder / "train", {"max_seq_len": LENGTH}, folder)
    assert sizes.rows == 200 and len(sizes.lengths) == 50
    assert summary(sizes)["real_share"] == pytest.approx(0.99, abs=0.01)


def test_texts_are_counted_in_characters(tmp_path, capsys):
    write(tmp_path / "train", {"text": "str"}, [{"text": "x" * n} for n in range(1, 102)])
    report_data(tmp_path, tmp_path / "out")
    fact = json.loads((tmp_path / "out" / "data.json").read_text())["train"]
    assert fact["real_share"] is None and fact["sequence_length"]["unit"] == "characters"
    assert (fact["sequence_length"]["mean"], fact["sequence_length"]["longest"]) == (51.0, 101)
    assert not (tmp_path / "out" / "rows.png").exists() and "characters" in capsys.readouterr().out


def test_full_rows_are_split_where_their_documents_end(tmp_path):
    from anymixer.data import wordpiece_tokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]
    wordpiece_tokenizer({word: n for n, word in enumerate(words)}).save_pretrained(str(tmp_path / "tokenizer"))
    rows = [{"tokens": np.array([2, 5, 5, 3, 5, 3, 5, 3], np.uint16)}, {"tokens": np.full(8, 5, np.uint16)}]
    write(tmp_path / "train", {"tokens": "ndarray:uint16:8"}, rows)
    sizes = measure(tmp_path / "train", {}, tmp_path)
    assert [row.tolist() for row in sizes.lengths] == [[4, 2, 2], [8]]
    assert sizes.capacity == 8 and sizes.real_share == 1.0


def test_a_folder_without_shards_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no index\.json"):
        report_data(tmp_path, tmp_path / "out")
