"""Conversion to a remote folder: an S3-compatible server on this machine, and the Hub's client replaced by a folder."""

import shutil
from pathlib import Path

import pytest

from anymixer.errors import UserError
from data_prep import remote, unit_work
from data_prep.convert import convert
from data_prep.options import ConvertOptions

BUCKET = "corpus"


@pytest.fixture
def bucket(s3_client):
    """An empty bucket: keys to contents."""
    s3_client.create_bucket(Bucket=BUCKET)
    return lambda: {
        item["Key"]: s3_client.get_object(Bucket=BUCKET, Key=item["Key"])["Body"].read()
        for item in s3_client.list_objects_v2(Bucket=BUCKET).get("Contents", [])
    }


@pytest.fixture
def options(tmp_path, number_tokenizer, text_of):
    files = []
    for number in range(3):
        documents = (text_of(begin, begin + 30) for begin in range(5 + 1000 * number, 1000 * number + 900, 30))
        files.append(tmp_path / f"{number}.txt")
        files[-1].write_text("\n\n".join(documents))

    def make(out_root, **given) -> ConvertOptions:
        common = {"input": tuple(files), "num_workers": 1, "val_fraction": 0.2, "dedup": True}
        rows = {"tokenizer": number_tokenizer, "pack_tokens": 64}
        return ConvertOptions(dataset="text", out_root=out_root, **{**common, **rows, **given})

    return make


@pytest.fixture
def unbroken(options, tmp_path, contents):
    convert(options(tmp_path / "local"))
    return contents(tmp_path / "local")


def visible(files: dict[str, bytes], folder: str) -> dict[str, bytes]:
    """What a reader of the data sees: all but the records of the conversion."""
    named = {name.removeprefix(f"{folder}/"): data for name, data in files.items()}
    return {name: data for name, data in named.items() if not name.startswith(".work/")}


def test_s3(bucket, options, unbroken, tmp_path):
    manifest = convert(options(f"s3://{BUCKET}/a/b", work_dir=tmp_path / "work"))
    assert visible(bucket(), "a/b") == unbroken
    assert not list((tmp_path / "work").rglob("*.mds"))  # what is there is not kept here
    assert convert(options(f"s3://{BUCKET}/a/b", work_dir=tmp_path / "elsewhere")) == manifest


def test_s3_by_machines_that_share_nothing_else(bucket, options, unbroken, tmp_path):
    url = f"s3://{BUCKET}/data"
    jobs = [options(url, shard=(number, 2), work_dir=tmp_path / str(number)) for number in range(2)]
    assert convert(jobs[0]) is None and convert(jobs[1]) is None
    assert convert(jobs[0]) is not None
    assert visible(bucket(), "data") == unbroken


def test_s3_after_a_machine_is_lost(bucket, options, unbroken, tmp_path, monkeypatch):
    url = f"s3://{BUCKET}/data"
    real, calls = remote.ObjectStore.upload, []

    def upload(self, names):
        for name in names:
            calls.append(name)
            if len(calls) == 12:
                raise KeyboardInterrupt
            real(self, [name])

    with monkeypatch.context() as patched:
        patched.setattr(remote.ObjectStore, "upload", upload)
        with pytest.raises(KeyboardInterrupt):
            convert(options(url, work_dir=tmp_path / "lost"))
    finished = [name for name in bucket() if "/units/" in name and name.endswith(".json")]
    assert len(finished) == 1
    shutil.copytree(tmp_path / "lost", tmp_path / "back")  # the same machine again: its second record is not there
    assert len(list((tmp_path / "back").glob(".work/*/units/*.json"))) == 2
    monkeypatch.setattr(unit_work, "_write", _not_twice(finished[0].rpartition("/")[2], unit_work._write))
    convert(options(url, work_dir=tmp_path / "new"))
    assert visible(bucket(), "data") == unbroken


def _not_twice(finished, real):
    def write(job, unit, temporary, watch):
        assert f"{unit.name}.json" != finished
        return real(job, unit, temporary, watch)

    return write


def test_the_remote_folder_is_what_counts(bucket, options, unbroken, tmp_path):
    """What an earlier conversion left here does not hold up one to an emptied folder, nor is it mistaken for it."""
    (tmp_path / "work" / ".work" / "train+val" / "units").mkdir(parents=True)
    (tmp_path / "work" / ".work" / "train+val" / "settings.json").write_text("{}")
    (tmp_path / "work" / ".work" / "train+val" / "units" / "00000.json").write_text("{}")
    (tmp_path / "work" / "manifest.json").write_text('{"splits": {"train": {}, "val": {}}}')
    convert(options(f"s3://{BUCKET}/data", work_dir=tmp_path / "work"))
    assert visible(bucket(), "data") == unbroken


def test_no_bucket(bucket, options, tmp_path):
    with pytest.raises(UserError, match="--out_root: s3://absent/x cannot be opened"):
        convert(options("s3://absent/x", work_dir=tmp_path / "work"))


class HubOfOneFolder:
    """The calls of the Hub's client that conversion makes, on a local folder."""

    folder: Path
    commits = 0

    def repo_info(self, repository, repo_type):
        if (repository, repo_type) != ("me/corpus", "dataset"):
            raise ValueError(f"no such repository: {repository}")

    def create_commit(self, repository, operations, repo_type, commit_message):
        type(self).commits += 1
        for operation in operations:
            target = self.folder / operation.path_in_repo
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(operation.path_or_fileobj, target)

    def list_repo_files(self, repository, repo_type):
        return [path.relative_to(self.folder).as_posix() for path in self.folder.rglob("*") if path.is_file()]

    def hf_hub_download(self, repository, path, repo_type):
        return self.folder / path


def test_the_hub(options, unbroken, tmp_path, contents, monkeypatch):
    HubOfOneFolder.folder = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.HfApi", HubOfOneFolder)
    convert(options("hf://datasets/me/corpus/v1", work_dir=tmp_path / "work"))
    assert visible(contents(tmp_path / "hub"), "v1") == unbroken
    assert HubOfOneFolder.commits == 8  # the settings, each unit's hashes, each unit, the results
    for url, message in (("hf://me/corpus", "give hf://datasets/OWNER"), ("hf://datasets/you/x", "cannot be opened")):
        with pytest.raises(UserError, match=message):
            convert(options(url, work_dir=tmp_path / "other"))
