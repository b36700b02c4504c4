"""The element-wise scan: its chunked form against its definition, and sequences of their own."""

import pytest
import torch
from anymixer_kernels import force_backend
from anymixer_kernels.elementwise_scan import elementwise_scan


@pytest.mark.parametrize("length", [1, 2, 9, 100])
@pytest.mark.parametrize("how", ["plain", "initial state", "packed"])
def test_chunks_equal_the_definition_with_all_gradients(length, how):
    torch.manual_seed(0)
    a = torch.rand(2, length, 3, 2, dtype=torch.float64, requires_grad=True)
    b = torch.randn(2, length, 3, 2, dtype=torch.float64, requires_grad=True)
    options = {}
    if how == "initial state":
        options["initial_state"] = torch.randn(2, 3, 2, dtype=torch.float64)
    elif how == "packed":
        options["sequence_id"] = torch.tensor([([0] * 3 + [1] * length)[:length], ([-1] * 2 + [0] * length)[:length]])
    results = []
    for backend in ("reference", "torch"):
        with force_backend(backend):
            h = elementwise_scan(a, b, **options)
        results.append((h, *torch.autograd.grad(h.square().sum(), (a, b), allow_unused=True)))
    for expected, actual in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_sequences_are_scanned_as_if_alone_and_padding_leaves_no_trace():
    torch.manual_seed(0)
    a, b = torch.rand(1, 9, 4), torch.randn(1, 9, 4)
    together = elementwise_scan(a, b, sequence_id=torch.tensor([[-1, -1, 0, 0, 0, 1, 1, -1, -1]]))
    for start, end in ((2, 5), (5, 7)):
        alone = elementwise_scan(a[:, start:end], b[:, start:end])
        torch.testing.assert_close(together[:, start:end], alone)
    torch.testing.assert_close(together[:, 8], together[:, 6])


def test_gates_of_zero_and_one():
    h = elementwise_scan(torch.tensor([[0.0, 1.0, 1.0, 0.0]]), torch.tensor([[1.0, 2.0, 3.0, 4.0]]))
    assert h.tolist() == [[1.0, 3.0, 6.0, 4.0]]
