import os
from pathlib import Path

import pytest
import torch

from anymixer.errors import UserError
from anymixer.training.checkpoints import LATEST, check_load_path, is_whole, list_checkpoints, named_checkpoint, recover


def save(folder: Path, name: str) -> Path:
    folder.mkdir(exist_ok=True)
    torch.save({"state": {"model": torch.arange(5000.0)}}, folder / name)
    return folder / name


def truncate(path: Path, share: float = 0.5) -> None:
    os.truncate(path, int(path.stat().st_size * share))


def test_checkpoints_are_ordered_by_step(tmp_path):
    for name in (
        "ep0-ba900-rank0.pt",
        "ep1-ba1000-rank0.pt",
        "ep0-ba90-rank0.pt",
        "other.pt",
        "ep0-ba95-rank0.pt.broken",
    ):
        save(tmp_path, name)
    (tmp_path / "ep0-ba500").mkdir()
    names = [path.name for path in list_checkpoints(tmp_path)]
    assert names == ["ep0-ba90-rank0.pt", "ep0-ba500", "ep0-ba900-rank0.pt", "ep1-ba1000-rank0.pt"]
    assert list_checkpoints(tmp_path / "missing") == []


def test_any_truncation_and_any_flipped_byte_of_a_tensor_is_noticed(tmp_path):
    path = save(tmp_path, "ep0-ba1-rank0.pt")
    whole = path.read_bytes()
    assert is_whole(path)
    for size in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        assert not is_whole(path)
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 1
    path.write_bytes(bytes(damaged))
    assert not is_whole(path)


def test_a_half_written_checkpoint_is_set_aside(tmp_path):
    good, bad = save(tmp_path, "ep0-ba2-rank0.pt"), save(tmp_path, "ep0-ba4-rank0.pt")
    truncate(bad)
    (tmp_path / LATEST).symlink_to(good.name)
    recovery = recover(tmp_path)
    assert recovery.checkpoint == good
    assert [path.name for path in recovery.set_aside] == ["ep0-ba4-rank0.pt.broken"]
    assert (tmp_path / LATEST).resolve() == good.resolve()
    assert "continuing from" in recovery.describe(tmp_path) and "ba4-rank0.pt.broken" in recovery.describe(tmp_path)
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("link", [None, "ep0-ba2-rank0.pt", "ep0-ba9-rank0.pt"], ids=["missing", "stale", "dangling"])
def test_the_symlink_points_to_the_newest(tmp_path, link):
    save(tmp_path, "ep0-ba2-rank0.pt")
    newest = save(tmp_path, "ep0-ba4-rank0.pt")
    if link is not None:
        (tmp_path / LATEST).symlink_to(link)
    assert recover(tmp_path).checkpoint == newest
    assert os.readlink(tmp_path / LATEST) == newest.name
    assert recover(tmp_path).set_aside == []


def test_nothing_whole_means_a_fresh_start(tmp_path):
    truncate(save(tmp_path, "ep0-ba2-rank0.pt"))
    (tmp_path / LATEST).symlink_to("ep0-ba2-rank0.pt")
    recovery = recover(tmp_path)
    assert recovery.checkpoint is None and len(recovery.set_aside) == 1
    assert not (tmp_path / LATEST).exists()
    assert "starting from the beginning" in recovery.describe(tmp_path)
    assert recover(tmp_path / "missing").checkpoint is None


def test_a_second_broken_file_of_one_name_is_kept_too(tmp_path):
    for _ in range(2):
        truncate(save(tmp_path, "ep0-ba2-rank0.pt"))
        recover(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "ep0-ba2-rank0.pt.broken",
        "ep0-ba2-rank0.pt.broken-2",
    ]


def save_shards(folder: Path) -> Path:
    from torch.distributed import checkpoint

    checkpoint.save({"weight": torch.arange(5000.0)}, storage_writer=checkpoint.FileSystemWriter(folder), no_dist=True)
    return folder


def test_shards_must_all_be_there(tmp_path):
    for number, damage in enumerate(["metadata", "missing", "short"]):
        folder = save_shards(tmp_path / f"ep0-ba{number}")
        assert is_whole(folder)
        shard = next(folder.glob("*.distcp"))
        if damage == "metadata":
            (folder / ".metadata").rename(folder / ".metadata.tmp")
        elif damage == "missing":
            shard.unlink()
        else:
            truncate(shard)
        assert not is_whole(folder), damage
    whole = save_shards(tmp_path / "ep0-ba1000")
    assert recover(tmp_path, sharded=True).checkpoint == whole
    with pytest.raises(UserError, match=r"^autoresume: .*state_dict_type=sharded"):
        recover(tmp_path, sharded=False)


def test_a_run_folder_names_its_newest_checkpoint(tmp_path):
    run = tmp_path / "run"
    for step in (9, 10):
        newest = save(run, f"ep0-ba{step}-rank0.pt")
    assert named_checkpoint(str(run)) == str(newest)
    assert named_checkpoint(str(newest)) == str(newest)
    assert named_checkpoint("s3://bucket/run") == "s3://bucket/run"
    shards = save_shards(run / "ep0-ba11")
    assert named_checkpoint(str(run)) == named_checkpoint(str(shards)) == str(shards)
    (tmp_path / "empty").mkdir()
    for sharded in (False, True):
        with pytest.raises(UserError, match=r"empty holds no whole checkpoint; name a run's folder"):
            check_load_path(named_checkpoint(str(tmp_path / "empty")), sharded=sharded)


def test_a_load_path_is_checked_before_any_work(tmp_path):
    path = save(tmp_path, "ep0-ba2-rank0.pt")
    check_load_path(str(path))
    check_load_path("s3://bucket/file.pt")
    with pytest.raises(UserError, match=r"^load_path: .*does not exist"):
        check_load_path(str(tmp_path / "none.pt"))
    with pytest.raises(UserError, match=r"^load_path: .*state_dict_type=full"):
        check_load_path(str(path), sharded=True)
    truncate(path)
    with pytest.raises(UserError, match=r"^load_path: .*truncated"):
        check_load_path(str(path))
