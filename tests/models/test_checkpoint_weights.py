"""Weights are read from checkpoint files, and nothing else is done with the files."""

import datetime
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from anymixer.errors import UserError
from anymixer.models.checkpoint_weights import load_checkpoint_weights, model_weights, read_checkpoint


class RunsCode:
    def __reduce__(self):
        return (print, ("this ran",))


def test_flat_and_nested_checkpoints_load(tmp_path):
    source, target = nn.Linear(3, 2), nn.Linear(3, 2)
    flat, nested = tmp_path / "flat.pt", tmp_path / "nested.pt"
    torch.save(source.state_dict(), flat)
    state = {"model": {f"model.{k}": v for k, v in source.state_dict().items()}, "time": datetime.timedelta(1)}
    torch.save({"state": state, "rng": [np.arange(3, dtype=np.uint32)], "v": torch.__version__}, nested)
    for path in (flat, nested):
        nn.init.zeros_(target.weight)
        load_checkpoint_weights(target, path, "model.pretrained_checkpoint")
        assert torch.equal(target.weight, source.weight)


def test_names_of_a_flat_file_lose_a_prefix_that_all_of_them_have():
    one = torch.ones(1)
    assert model_weights({"model.a": one, "model.b": one}, "key").keys() == {"a", "b"}
    assert model_weights({"model.word": one, "lm_head": one}, "key").keys() == {"model.word", "lm_head"}
    nested = {"state": {"model": {"model.model.word": one, "model.lm_head": one}}}
    assert model_weights(nested, "key").keys() == {"model.word", "lm_head"}


def test_a_file_that_wants_to_run_code_is_refused(tmp_path, capsys):
    path = tmp_path / "evil.pt"
    torch.save({"state": {"model": RunsCode()}}, path)
    with pytest.raises(UserError, match="is refused: it holds more than tensors"):
        read_checkpoint(path, "key")
    path.write_bytes(pickle.dumps(RunsCode()))
    with pytest.raises(UserError, match="key: "):
        read_checkpoint(path, "key")
    assert "this ran" not in capsys.readouterr().out


def test_a_text_is_no_checkpoint(tmp_path):
    (tmp_path / "README.md").write_text("# A model\n")
    with pytest.raises(UserError, match="is refused: it is no checkpoint"):
        read_checkpoint(tmp_path / "README.md", "key")


def test_half_a_file_is_named(tmp_path):
    path = tmp_path / "half.pt"
    torch.save(nn.Linear(100, 100).state_dict(), path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match="is not a whole checkpoint"):
        read_checkpoint(path, "key")


def test_weights_that_do_not_fit_are_listed(tmp_path):
    path = tmp_path / "other.pt"
    torch.save({"weight": torch.zeros(5, 5), "extra": torch.zeros(1)}, path)
    with pytest.raises(
        UserError, match=r"1 missing \(bias\); 1 unexpected \(extra\); 1 of another shape \(weight: \[5, 5\] for"
    ):
        load_checkpoint_weights(nn.Linear(3, 2), path, "key")
