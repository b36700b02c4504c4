"""Damaged, cut and missing shards: one line where nothing else can be done, fetched again where there is a remote."""

import shutil
import threading
from pathlib import Path

import pytest
import torch

from anymixer.data import DatasetConfig, LoaderConfig, StreamConfig, build_loader, streams
from anymixer.errors import UserError

pytest.importorskip("composer")
LENGTH = 32


def flip(path):
    data = bytearray(path.read_bytes())
    data[-6] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


def loader(tokenizer, local, workers=0, **dataset):
    settings = DatasetConfig(local=str(local), max_seq_len=LENGTH, **{"download_retry": 2, **dataset})
    config = LoaderConfig(num_workers=workers, dataset=settings)
    return build_loader(config, tokenizer, device_batch_size=8, seed=17, train=True).dataloader


def read(*arguments, **options):
    return list(loader(*arguments, **options))


def same(left, right):
    return len(left) == len(right) and all(torch.equal(a[name], b[name]) for a, b in zip(left, right) for name in a)


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(streams, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr("streaming.base.util.sleep", lambda seconds: None)


@pytest.fixture(params=["plain", "zstd"])
def data(request, packed_data, writers, tokenizer, tmp_path):
    """A copy of the packed rows that a test may damage: plain shards, or compressed ones."""
    copy = shutil.copytree(packed_data, tmp_path / "data")
    if request.param == "zstd":
        pytest.importorskip("zstandard")
        shutil.rmtree(copy / "train")
        columns = {"tokens": "ndarray:uint16", "lengths": "ndarray:uint16"}
        rows = writers["packed"](tokenizer, range(320))
        writers["split"](copy / "train", columns, rows, size_limit=8192, compression="zstd:7")
    return copy


def shard_of(folder):
    return sorted((folder / "train").glob("shard.00002.mds*"))[-1]  # the compressed form, where there is one


def test_compressed_rows_are_the_plain_ones(data, packed_data, tokenizer):
    for _ in range(2):  # the second time, the decompressed forms are there
        assert same(read(tokenizer, data), read(tokenizer, packed_data))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("damage", "words"), [(flip, "is damaged (xxh64 differs"), (cut, "is truncated ("), ("missing", "is missing;")]
)
def test_the_only_copy_is_named_and_left_alone(data, tokenizer, damage, words, workers):
    if damage == "missing":
        shard_of(data).unlink()
    else:
        damage(shard_of(data))
    left = {path.name for path in (data / "train").iterdir()}
    with pytest.raises(UserError) as caught:
        read(tokenizer, data, workers)
    message = str(caught.value)
    assert message.startswith(f"{data}/train/shard.00002.mds") and f"the shard {words}" in message
    assert message.endswith("copy it again or convert the data again") and "\n" not in message
    assert left <= {path.name for path in (data / "train").iterdir()}


def test_a_shard_that_goes_missing_while_running_is_named(data, tokenizer):
    running = iter(loader(tokenizer, data, predownload=8))
    next(running)
    for path in (data / "train").glob("shard.*"):
        path.unlink()
    with pytest.raises(UserError, match=r"train/shard\.0000\d\.mds\S*: the shard is missing; copy it again"):
        list(running)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("damage", [flip, cut, "missing"])
def test_a_damaged_cache_is_fetched_again(data, packed_data, tokenizer, tmp_path, damage, workers):
    cache = tmp_path / "cache"
    expected = read(tokenizer, packed_data)
    assert same(read(tokenizer, cache, workers, remote=str(data)), expected)
    for path in (cache / "train").glob("shard.*"):
        path.unlink() if damage == "missing" else damage(path)
    assert same(read(tokenizer, cache, workers, remote=str(data)), expected)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize(
    ("damage", "words"),
    [(flip, "is damaged (2 attempts"), (cut, "is damaged (2 attempts"), ("missing", "cannot be fetched (2 attempts")],
)
def test_a_damaged_remote_is_named_after_all_attempts(data, tokenizer, tmp_path, damage, words, workers):
    shard = shard_of(data)
    shard.unlink() if damage == "missing" else damage(shard)
    with pytest.raises(UserError) as caught:
        read(tokenizer, tmp_path / "cache", workers, remote=str(data))
    message = str(caught.value)
    assert message.startswith(f"{shard}: the shard {words}") and "\n" not in message
    assert message.endswith("see that it is there and can be read, or convert the data again")
    assert not (tmp_path / "cache/train" / shard.name).exists()


def test_what_arrives_damaged_is_fetched_again_after_a_pause(data, packed_data, tokenizer, tmp_path, monkeypatch):
    from streaming.base.storage.download import LocalDownloader

    fetch, tries, pauses = LocalDownloader._download_file_impl, {}, []

    def unreliable(self, remote, local, timeout):
        """The first time nothing arrives, the second time half of it."""
        tries[remote] = tries.get(remote, 0) + 1
        if tries[remote] == 1:
            raise OSError("connection reset")
        fetch(self, remote, local, timeout)
        if tries[remote] == 2 and ".mds" in local:
            cut(Path(local))

    monkeypatch.setattr(LocalDownloader, "_download_file_impl", unreliable)
    monkeypatch.setattr(streams, "sleep", pauses.append)
    assert same(read(tokenizer, tmp_path / "cache", remote=str(data)), read(tokenizer, packed_data))
    assert set(tries.values()) == {2, 3} and set(pauses) == {0.01}


def test_an_index_that_cannot_be_fetched(tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"^/nowhere/train/index\.json: cannot fetch or read the index"):
        loader(tokenizer, tmp_path / "cache", remote="/nowhere")


def test_a_mixture_names_the_stream_that_is_damaged(data, packed_data, tokenizer):
    flip(shard_of(data))
    parts = {"good": StreamConfig(local=str(packed_data)), "bad": StreamConfig(local=str(data))}
    settings = DatasetConfig(max_seq_len=LENGTH, streams=parts)
    spec = build_loader(
        LoaderConfig(num_workers=0, dataset=settings), tokenizer, device_batch_size=8, seed=1, train=True
    )
    with pytest.raises(UserError, match=f"^{shard_of(data)}: the shard is damaged"):
        list(spec.dataloader)


def test_both_threads_that_fetch_shards_may_fail_at_once(packed_data, tokenizer, tmp_path, monkeypatch):
    """Streaming counts the threads that ended well, and would wait for the others for ever."""
    from streaming import StreamingDataset

    both = threading.Barrier(2)

    def fail(self, shard_id, blocking=True):
        both.wait(300)
        raise UserError("no shard today")

    monkeypatch.setattr(StreamingDataset, "prepare_shard", fail)
    broken = loader(tokenizer, tmp_path / "cache", remote=str(packed_data))
    errors = []

    def run():
        try:
            list(broken)
        except UserError as error:
            errors.append(str(error))

    reading = threading.Thread(target=run, daemon=True)
    reading.start()
    reading.join(400)
    assert errors == ["no shard today"]
