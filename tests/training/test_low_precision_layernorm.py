"""The algorithm low_precision_layernorm reaches the norms that are fused with their residual's sum."""

from types import SimpleNamespace

import torch
from composer.core import Event, Precision

from anymixer.models import ModelConfig, build_model
from anymixer.models.backbone import Residual
from anymixer.training.algorithms import ALGORITHMS


def lowered():
    """A tiny encoder's last hidden states under bfloat16 autocast: as it is, and with the algorithm applied."""
    torch.manual_seed(0)
    config = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "hidden_dropout_prob": 0.0}
    model = build_model(ModelConfig(mixer={"name": "attention", "num_heads": 2}, model_config=config))
    ids = torch.randint(5, 64, (2, 12))

    def run():
        with torch.autocast("cpu", torch.bfloat16):
            return model.bert(ids).last_hidden_state

    before = run()
    (algorithm,) = ALGORITHMS.build({"low_precision_layernorm": {}})
    state = SimpleNamespace(model=model, optimizers=(), _precision=Precision.AMP_BF16)
    algorithm.apply(Event.INIT, state, None)
    return model, ids, before, run()


def test_the_hidden_states_between_layers_have_the_dtype_of_autocast():
    model, ids, before, after = lowered()
    assert before.dtype == torch.float32 and after.dtype == torch.bfloat16
    torch.testing.assert_close(after.float(), before, atol=5e-2, rtol=2e-2)
    assert model.bert(ids).last_hidden_state.dtype == torch.float32, "without autocast nothing changes"


def test_a_residual_rounds_once():
    model, *_ = lowered()
    residual = next(m for m in model.modules() if isinstance(m, Residual))
    hidden, mixed = torch.randn(2, 4, 32), torch.randn(2, 4, 32)
    exact = torch.nn.functional.layer_norm(hidden + mixed, (32,), residual.norm.weight, residual.norm.bias, 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        low, copy = residual.around(hidden, None, lambda _: mixed)
    assert copy is None
    torch.testing.assert_close(low.float(), exact, atol=2**-9 * 4, rtol=2**-8)
