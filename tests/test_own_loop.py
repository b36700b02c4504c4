"""The example of a training loop of one's own: it learns, and its parameters are in the groups that it says."""

import importlib.util
from pathlib import Path

import pytest

from anymixer.training.optimizers import parameter_groups

spec = importlib.util.spec_from_file_location("own_loop", Path(__file__).parents[1] / "examples" / "own_loop.py")
own_loop = importlib.util.module_from_spec(spec)
spec.loader.exec_module(own_loop)


def test_state_spaces_train_at_a_rate_of_their_own():
    model = own_loop.DigitClassifier(width=8, depth=2, d_state=4)
    groups = {group.get("lr"): group for group in parameter_groups(model, weight_decay=0.01)}
    own = {id(p) for p in groups[1e-3]["params"]}
    expected = {
        name for name, _ in model.named_parameters() if name.split(".")[-1] in ("log_dt", "log_A_real", "A_imag", "B")
    }
    assert {name for name, p in model.named_parameters() if id(p) in own} == expected
    assert groups[1e-3]["weight_decay"] == 0.0


def test_a_tiny_model_learns():
    assert own_loop.train(epochs=4, batch_size=32, lr=1e-2, width=16, depth=1, d_state=8) > 0.3


@pytest.mark.slow
def test_the_example_reaches_97_percent():
    assert own_loop.train() >= 0.97
