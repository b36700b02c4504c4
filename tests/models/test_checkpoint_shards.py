"""Folders of shards are read whole, and nothing that they hold is run."""

import datetime
import pickle
import warnings

import pytest
import torch
from torch.distributed import checkpoint

from anymixer.errors import UserError
from anymixer.models.checkpoint_shards import METADATA, read_index
from anymixer.models.checkpoint_weights import RefusedCheckpoint, load_checkpoint_weights, read_checkpoint


class RunsCode:
    def __reduce__(self):
        return (print, ("this ran",))


def save(folder, **state):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint.save({"state": state}, storage_writer=checkpoint.FileSystemWriter(folder), no_dist=True)
    return folder


def test_shards_read_like_a_whole_file(tmp_path):
    source, target = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    weights = {f"model.{k}": v for k, v in source.state_dict().items()}
    folder = save(tmp_path / "ep0-ba1", model=weights, timestamp={"time": datetime.timedelta(2)}, run_name="x")
    state = read_checkpoint(folder, "key")["state"]
    assert state["timestamp"]["time"] == datetime.timedelta(2) and state["run_name"] == "x"
    assert torch.equal(state["model"]["model.bias"], source.bias)
    load_checkpoint_weights(target, folder, "key")
    assert torch.equal(target.weight, source.weight)


def test_an_object_that_wants_to_run_code_is_refused(tmp_path, capsys):
    folder = save(tmp_path / "ep0-ba1", model={"weight": torch.ones(2)}, callbacks=RunsCode())
    with pytest.raises(RefusedCheckpoint, match=r"key: .*state.callbacks.* is refused: it holds more than tensors"):
        read_checkpoint(folder, "key")
    assert "this ran" not in capsys.readouterr().out


def test_an_index_that_wants_to_run_code_is_refused(tmp_path, capsys):
    folder = save(tmp_path / "ep0-ba1", model={"weight": torch.ones(2)})
    (folder / METADATA).write_bytes(pickle.dumps({"state": RunsCode()}))
    with pytest.raises(RefusedCheckpoint, match=r"is refused: it holds more than an index \(builtins.print\)"):
        read_index(folder, "key")
    assert "this ran" not in capsys.readouterr().out


def test_an_index_stays_in_its_folder(tmp_path):
    folder = save(tmp_path / "ep0-ba1", model={"weight": torch.ones(2)})
    metadata = read_index(folder, "key")
    for stored in metadata.storage_data.values():
        stored.relative_path = "../elsewhere"
    (folder / METADATA).write_bytes(pickle.dumps(metadata))
    with pytest.raises(RefusedCheckpoint, match=r"it names \.\./elsewhere"):
        read_index(folder, "key")


def test_half_a_checkpoint_is_named(tmp_path):
    folder = save(tmp_path / "ep0-ba1", model={"weight": torch.ones(2)})
    index = (folder / METADATA).read_bytes()
    (folder / METADATA).write_bytes(index[: len(index) // 2])
    with pytest.raises(UserError, match=r"key: .*\.metadata is damaged"):
        read_checkpoint(folder, "key")
    (folder / METADATA).write_bytes(index)
    next(folder.glob("*.distcp")).unlink()
    with pytest.raises(UserError, match="is not a whole checkpoint"):
        read_checkpoint(folder, "key")
    (folder / METADATA).unlink()
    with pytest.raises(UserError, match=r"\.metadata is missing"):
        read_checkpoint(folder, "key")
