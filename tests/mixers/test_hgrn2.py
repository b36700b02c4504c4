"""HGRN2: chunked equals recurrent at every lower bound, in float32 and bfloat16."""

import pytest
import torch

from anymixer.mixers.hgrn2 import HGRN2


@pytest.mark.parametrize("bound", [0.0, 0.5, 0.99])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_chunks_equal_the_recurrence(bound, dtype, tolerance):
    torch.manual_seed(0)
    mixer = HGRN2(64, expand_ratio=16, lower_bound=bound).double()
    for parameter in mixer.parameters():
        parameter.data *= 4  # gates near 0 and 1
    hidden = torch.randn(2, 150, 64, dtype=torch.float64)
    state, outputs = mixer.init_state(2, dtype=torch.float64), []
    for token in hidden.unbind(1):
        output, state = mixer.step(token, state)
        outputs.append(output)
    expected = torch.stack(outputs, 1)
    actual = mixer.to(dtype)(hidden.to(dtype)).double()
    assert (actual - expected).norm() < tolerance * expected.norm()


def test_extreme_gates_stay_finite():
    mixer = HGRN2(32, expand_ratio=8)
    hidden = (1e3 * torch.randn(1, 40, 32)).requires_grad_()
    output = mixer(hidden)
    output.sum().backward()
    assert output.isfinite().all() and hidden.grad.isfinite().all()
