"""The matrix mixers against what the reference implementation computed."""

from pathlib import Path

import pytest
from anymixer_kernels import force_backend
from safetensors import safe_open

from anymixer import MatrixMixer

GOLDENS = sorted((Path(__file__).parents[1] / "goldens").glob("matrix_*.safetensors"))
NUMBERS = ("d_model", "qk_dim", "headdim", "max_seq_len")


def load(path):
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        found = file.metadata()
    options = {key: int(found[key]) for key in NUMBERS}
    options |= {
        "matrix_mixer_type": found["matrix_mixer_type"],
        "is_data_dependent": found["is_data_dependent"] == "True",
    }
    return tensors, options


def assert_near(actual, expected, name):
    assert (actual - expected).norm() <= 1e-5 * expected.norm() + 1e-7, name


@pytest.mark.parametrize("path", GOLDENS, ids=lambda path: path.stem)
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("parity", ["exact", "reference"])
def test_output_and_every_gradient_match(path, backend, parity):
    tensors, options = load(path)
    block = MatrixMixer(**options, parity=parity)
    weights = {k.removeprefix("param."): v for k, v in tensors.items() if k.startswith("param.")}
    block.load_state_dict(weights, strict=True)
    hidden = tensors["input"].clone().requires_grad_()
    with force_backend(backend):
        output = block(hidden)
        (output * tensors["cotangent"]).sum().backward()
    assert_near(output, tensors["output"], "output")
    assert_near(hidden.grad, tensors["grad.input"], "input")
    for name, parameter in block.named_parameters():
        assert_near(parameter.grad, tensors[f"grad.{name}"], name)


def test_there_are_goldens():
    assert len(GOLDENS) == 10
