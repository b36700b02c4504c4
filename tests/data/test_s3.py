"""Shards in an S3 bucket, served by a local server."""

import pytest
import torch

from anymixer.data import DatasetConfig, LoaderConfig, build_loader
from anymixer.errors import UserError

pytest.importorskip("composer")


@pytest.fixture
def bucket(s3_client, packed_data, monkeypatch):
    """An S3 client and a bucket that holds the packed rows under `data/`."""
    monkeypatch.setattr("anymixer.data.streams._FIRST_PAUSE", 0.01)
    monkeypatch.setattr("streaming.base.util.sleep", lambda seconds: None)
    s3_client.create_bucket(Bucket="rows")
    for path in (packed_data / "train").iterdir():
        s3_client.upload_file(str(path), "rows", f"data/train/{path.name}")
    return s3_client


def read(tokenizer, workers=0, **dataset):
    settings = DatasetConfig(max_seq_len=32, **dataset)
    config = LoaderConfig(num_workers=workers, dataset=settings)
    return list(build_loader(config, tokenizer, device_batch_size=8, seed=17, train=True).dataloader)


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_of_a_bucket_are_those_of_a_folder(bucket, packed_data, tokenizer, tmp_path, workers):
    remote = {"local": str(tmp_path), "remote": "s3://rows/data"}
    expected = read(tokenizer, local=str(packed_data))
    for _ in range(2):  # the second time from the cache
        found = read(tokenizer, workers, **remote)
        assert len(found) == len(expected)
        assert all(torch.equal(a[name], b[name]) for a, b in zip(found, expected) for name in a)


def test_an_object_that_is_damaged_in_the_bucket(bucket, packed_data, tokenizer, tmp_path):
    body = bytearray((packed_data / "train/shard.00001.mds").read_bytes())
    body[-6] ^= 1
    bucket.put_object(Bucket="rows", Key="data/train/shard.00001.mds", Body=bytes(body))
    with pytest.raises(UserError, match=r"^s3://rows/data/train/shard\.00001\.mds: the shard is damaged \(4 attempts"):
        read(tokenizer, local=str(tmp_path), remote="s3://rows/data")


def test_a_bucket_that_does_not_exist(bucket, tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"^s3://nobody/data/train/index\.json: cannot fetch or read the index"):
        read(tokenizer, local=str(tmp_path), remote="s3://nobody/data")
