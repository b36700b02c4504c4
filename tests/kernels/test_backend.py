"""Which form of an op is taken, and what is said about it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from anymixer_kernels import backend, force_backend
from anymixer_kernels.backend import takes_triton
from anymixer_kernels.linear_recurrence import linear_recurrence
from anymixer_kernels.low_rank import TILES_LENGTH, low_rank_mix


@pytest.fixture(autouse=True)
def said(monkeypatch, caplog):
    """What is logged, with nothing said before; Triton runs on any device."""
    caplog.set_level("INFO", logger=backend.__name__)
    monkeypatch.setattr(backend, "triton_problem", lambda device: None)
    backend._announced.cache_clear()
    yield caplog
    backend._announced.cache_clear()


ON_GPU: Any = SimpleNamespace(is_cuda=True, device=torch.device("cuda"), dtype=torch.float32)


def test_what_keeps_a_gpu_from_triton_is_said_once(said):
    assert not any(takes_triton(ON_GPU, "an op", "odd widths") for _ in range(3))
    assert [r.getMessage() for r in said.records] == [
        "an op: the PyTorch form runs, because it has no form for odd widths"
    ]


def test_a_form_that_is_slower_is_not_taken_and_that_is_said_once(said):
    for name in ("auto", "triton"):
        with force_backend(name):
            assert not takes_triton(ON_GPU, "an op", slower="long rows") and takes_triton(ON_GPU, "an op")
    assert [r.getMessage() for r in said.records] == ["an op: torch, which is faster for long rows", "an op: triton"]


def test_an_op_without_a_triton_form_says_so_once_where_triton_is_forced(said):
    q, v = torch.ones(1, 4, 1, 2), torch.ones(1, 4, 1, 3)
    for name in ("auto", "triton", "triton"):
        with force_backend(name):
            linear_recurrence(q, q, v, torch.zeros(1, 4, 1))
    assert [r.getMessage() for r in said.records] == [
        "linear recurrence: the PyTorch form runs, because it has no Triton form yet"
    ]


@pytest.mark.parametrize("packed", [False, True])
def test_long_low_rank_rows_take_the_linear_form_with_any_backend(packed, said):
    torch.manual_seed(0)
    length = TILES_LENGTH + 2
    q, v = torch.randn(1, length, 1, 2), torch.randn(1, length, 1, 3)
    ids = torch.arange(length)[None] // 700 if packed else None
    expected = low_rank_mix(q, q, v, ids)
    for name in ("triton", "mamba_ssm"):
        with force_backend(name):
            torch.testing.assert_close(low_rank_mix(q, q, v, ids), expected)
    assert "low-rank mixing: torch, which is faster for rows of more than 1,024 tokens" in said.text
