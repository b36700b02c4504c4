"""What the tests of Triton forms share: where they can run, and outputs full of NaN before a kernel writes them."""

import importlib.util
import itertools
import tempfile
from pathlib import Path

import pytest
import torch
from filelock import FileLock

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Small where every program runs in Python.
ON_GPU = DEVICE == "cuda"

# Relative norms against float64.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")


@pytest.fixture
def poisoned(monkeypatch):
    """Whatever is allocated without a value holds NaN (floats) or the largest number (integers)."""

    def poison(allocate):
        def call(*args, **options):
            out = allocate(*args, **options)
            return out.fill_(torch.nan if out.is_floating_point() else torch.iinfo(out.dtype).max)

        return call

    for name in ("empty", "empty_like", "empty_strided"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))


@pytest.fixture
def most_of_the_gpu():
    """Up to 60 GB: taken by one test at a time, whatever process runs it, and given back."""
    if not ON_GPU:
        pytest.skip("needs a GPU and up to 60 GB of its memory")
    with FileLock(Path(tempfile.gettempdir(), "anymixer-tests-gpu.lock")):
        yield
        torch.cuda.empty_cache()


def relative_error(actual, expected):
    """|actual - expected| / |expected| in float64, |actual| where nothing is expected; NaN is infinitely wrong."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    size = expected.norm()
    error = (actual - expected).norm() / (size if size > 1e-9 else 1.0)
    return float("inf") if error.isnan() else float(error)


def packed_ids(length):
    """A row of five sequences, one of a single token, with padding; and a row of one sequence with padding."""
    edges = sorted({0, length // 7, length // 7 + 1, length // 3, (2 * length) // 3, length - 1 - length // 9})
    ids = torch.full((2, length), -1)
    for i, (start, end) in enumerate(itertools.pairwise(edges)):
        ids[0, start:end] = i
    ids[1, : max(1, length - 2)] = 0
    return ids
