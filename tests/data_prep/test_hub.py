"""The `datasets` library's way of reading, on a folder that it loads like a repository of the Hub."""

import json

import pytest

from anymixer.errors import UserError
from data_prep.catalogue import expected_documents
from data_prep.convert import convert
from data_prep.options import ConvertOptions


@pytest.fixture
def repository(tmp_path):
    """A dataset of three train files and a validation file."""
    folder = tmp_path / "dataset"
    folder.mkdir()
    for name, count in (("train-0", 5), ("train-1", 3), ("train-2", 4), ("validation-0", 2)):
        records = (json.dumps({"text": f" {name} {number}\n", "url": "x"}) for number in range(count))
        (folder / f"{name}.jsonl").write_text("\n".join([*records, json.dumps({"text": "", "url": "y"})]))
    return folder


def test_each_file_is_a_unit(repository, tmp_path, read_samples):
    manifest = convert(ConvertOptions(dataset=str(repository), out_root=tmp_path / "out", num_workers=1))
    assert [part["shard"] for part in manifest["inputs"]] == [0, 1, 2, 0]
    texts = [sample["text"] for sample in read_samples(tmp_path / "out" / "train")]
    assert texts == [f"train-{file} {number}" for file, count in enumerate((5, 3, 4)) for number in range(count)]
    assert manifest["splits"]["val"]["documents"] == 2
    assert len(list((tmp_path / "out" / "train").glob("0*"))) == 3


def test_a_dataset_without_held_out_documents(repository, tmp_path):
    (repository / "validation-0.jsonl").unlink()
    given = ConvertOptions(dataset=str(repository), out_root=tmp_path / "out", num_workers=1, val_fraction=0.4)
    facts = convert(given)["splits"]
    assert facts["train"]["documents"] + facts["val"]["documents"] == 12 and facts["val"]["documents"] > 0


def test_limits_count_over_all_files(repository, tmp_path):
    given = {"dataset": str(repository), "num_workers": 1, "splits": ("train",)}
    facts = convert(ConvertOptions(out_root=tmp_path / "out", max_docs=7, **given))["splits"]["train"]
    assert facts["documents"] == 7


def test_mistakes_are_named(repository, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    given = {"out_root": tmp_path / "out", "num_workers": 1}
    with pytest.raises(UserError, match=r"no column 'body' \(it has: text, url\); see --text_column"):
        convert(ConvertOptions(dataset=str(repository), text_column="body", **given))
    with pytest.raises(UserError, match=r"--dataset: .*absent cannot be read"):
        convert(ConvertOptions(dataset=str(tmp_path / "absent"), **given))
    assert not (tmp_path / "out").exists()


def test_known_sizes():
    assert expected_documents("c4", None, "train") == expected_documents("c4", "en", "train") == 364_868_892
    assert expected_documents("c4", "en", "val_small") == 10_000
    assert expected_documents("c4", "realnewslike", "train") is None
    assert expected_documents("text", None, "train") is None
