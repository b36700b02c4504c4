"""Hydra against what the reference implementation computed, and its published interface."""

from pathlib import Path

import pytest
import torch
from anymixer_kernels import force_backend
from safetensors import safe_open

from anymixer import Hydra
from anymixer.errors import UserError

GOLDENS = Path(__file__).parents[1] / "goldens"


@pytest.mark.parametrize("name", ["hydra", "hydra_groups2"])
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_output_and_every_gradient_match_the_reference(name, backend):
    with safe_open(GOLDENS / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        options = {k: int(v) for k, v in file.metadata().items() if k not in ("kind", "batch", "length")}
    block = Hydra(**options)
    weights = {k.removeprefix("param."): v for k, v in tensors.items() if k.startswith("param.")}
    block.load_state_dict(weights, strict=True)
    hidden = tensors["input"].clone().requires_grad_()
    with force_backend(backend):
        output = block(hidden)
        (output * tensors["cotangent"]).sum().backward()

    def check(actual, expected):
        assert (actual - expected).norm() / expected.norm() < 1e-5

    check(output, tensors["output"])
    check(hidden.grad, tensors["grad.input"])
    for parameter, value in block.named_parameters():
        check(value.grad, tensors[f"grad.{parameter}"])


def test_published_example_runs():
    block = Hydra(d_model=16, d_state=64, d_conv=7, expand=2, use_mem_eff_path=False)
    assert block.headdim == 32
    assert block(torch.randn(2, 64, 16)).shape == (2, 64, 16)


def test_default_size_and_parameter_count():
    block = Hydra(d_model=768, device="meta")
    assert (block.nheads, block.headdim) == (24, 64)
    assert sum(p.numel() for p in block.parameters()) == 3_825_224


def test_initial_values():
    torch.manual_seed(0)
    block = Hydra(d_model=768)
    dt = torch.nn.functional.softplus(block.dt_bias)
    assert dt.min() >= 1e-4 and dt.max() <= 0.1 + 1e-6 and dt.std() > 0
    assert torch.equal(block.A_log, torch.zeros(24)) and torch.equal(block.D, torch.ones(24))
    assert block.conv1d.weight.abs().max() <= 7**-0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"headdim": 48}, "Hydra.headdim: 48 does not divide expand"),
        ({"d_conv": 4}, "Hydra.d_conv: 4 is even"),
        ({"ngroups": 3}, "Hydra.ngroups: 3 does not divide"),
        ({"d_state": 0}, "Hydra.d_state: 0 is not positive"),
    ],
)
def test_impossible_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        Hydra(d_model=64, **options)


def test_tokens_at_any_distance_reach_each_other():
    block = Hydra(d_model=16, d_state=8)
    hidden = torch.randn(1, 400, 16, requires_grad=True)
    block(hidden)[0, 200].sum().backward()
    reached = hidden.grad[0].abs().sum(-1)
    assert reached[150] > 0 and reached[250] > 0
