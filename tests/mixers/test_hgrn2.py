"""HGRN2: chunked equals recurrent at every lower bound, in float32 and bfloat16; its bidirectional form computes the
equations, and its state costs no parameters."""

import pytest
import torch

from anymixer import HGRN2
from anymixer.layers.packing import make_packing
from anymixer.mixers import build_mixer
from anymixer.mixers.hgrn2 import LowerBounds
from anymixer.training.optimizers import parameter_groups


@pytest.mark.parametrize("bound", [0.0, 0.5, 0.99])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_chunks_equal_the_recurrence(bound, dtype, tolerance):
    torch.manual_seed(0)
    mixer = HGRN2(64, causal=True, expand_ratio=16, lower_bound=bound).double()
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


@pytest.mark.parametrize("causal", [True, False])
def test_extreme_gates_stay_finite(causal):
    mixer = HGRN2(32, causal=causal, expand_ratio=8)
    hidden = (1e3 * torch.randn(1, 40, 32)).requires_grad_()
    output = mixer(hidden)
    output.sum().backward()
    assert output.isfinite().all() and hidden.grad.isfinite().all()


def scan(gates, writes):
    """Every state of S_t = Diag(f_t) S_{t-1} + k_t v_t^T: [batch, length, heads, e, e]."""
    state, states = torch.zeros_like(writes[:, 0]), []
    for f, write in zip(gates.unbind(1), writes.unbind(1)):
        state = f[..., None] * state + write
        states.append(state)
    return torch.stack(states, 1)


@pytest.mark.parametrize("bound", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("packed", [False, True])
def test_both_ways_it_computes_the_equations_with_the_diagonal_once(bound, packed):
    """Two scans with one set of projections, read once, less what both have of the token itself."""
    torch.manual_seed(0)
    d_model, e, length = 24, 6, 40
    mixer = HGRN2(d_model, expand_ratio=e, lower_bound=bound).double()
    hidden = torch.randn(2, length, d_model, dtype=torch.float64)
    sizes = [13, 1, 26] if packed else [length]
    i, o, f = mixer.in_proj(hidden).unflatten(-1, (3, d_model // e, e)).unbind(2)
    f = bound + (1 - bound) * f.sigmoid()
    write = (1 - f)[..., None] * i[..., None, :]
    states = [
        scan(gates, own) + scan(gates.flip(1), own.flip(1)).flip(1) - own
        for gates, own in zip(f.split(sizes, 1), write.split(sizes, 1))
    ]
    read = torch.nn.functional.silu(o)[..., None, :] @ torch.cat(states, 1)
    expected = mixer.out_proj(mixer.norm(read[..., 0, :].flatten(-2)))
    ids = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).expand(2, -1)
    actual = mixer(hidden, make_packing(None, ids) if packed else None)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)


def test_both_ways_it_has_no_state_and_below_the_diagonal_is_causal():
    torch.manual_seed(0)
    mixer, causal = HGRN2(16, expand_ratio=4), HGRN2(16, causal=True, expand_ratio=4)
    causal.load_state_dict(mixer.state_dict())
    hidden = torch.randn(1, 9, 16)
    torch.testing.assert_close(mixer.matrix(hidden).tril(), causal.matrix(hidden))
    assert mixer.matrix(hidden).triu(1).abs().sum() > 0
    calls = (
        lambda: mixer.init_state(1),
        lambda: mixer.step(hidden[:, 0], {}),
        lambda: mixer.prefill(hidden),
        lambda: mixer.state_size(9),
    )
    for call in calls:
        with pytest.raises(NotImplementedError, match="HGRN2 is not causal"):
            call()


def test_a_wrapping_of_it_is_the_same_with_the_diagonal_twice():
    torch.manual_seed(0)
    one = HGRN2(16, expand_ratio=4)
    two = build_mixer({"name": "bidirectional", "mixer": {"name": "hgrn2", "expand_ratio": 4}}, 16)
    two.mixers[0].load_state_dict(one.state_dict())
    hidden = torch.randn(1, 9, 16)
    ahead, back = two.matrix(hidden).chunk(2, dim=1)
    once = one.matrix(hidden)
    twice = once + torch.diag_embed(once.diagonal(dim1=-2, dim2=-1))
    torch.testing.assert_close(ahead + back, twice)


def test_more_state_costs_no_parameters():
    counts = {e: sum(p.numel() for p in HGRN2(128, expand_ratio=e).parameters()) for e in (1, 2, 4, 8, 16, 32, 64, 128)}
    assert set(counts.values()) == {4 * 128**2 + 128}
    states = [HGRN2(128, causal=True, expand_ratio=e).state_size(1) for e in counts]
    assert states == [4 * 128 * e for e in counts]


def test_the_lower_bounds_are_not_decayed():
    (group,) = parameter_groups(LowerBounds(4, 8), weight_decay=0.1)
    assert group["weight_decay"] == 0


@pytest.mark.parametrize("share", [True, False])
def test_a_wrapping_s_layers_share_their_bounds(share):
    spec = {"name": "bidirectional", "mixer": {"name": "hgrn2", "expand_ratio": 4}, "share": share}
    layers = [build_mixer(spec, 8, i) for i in range(3)]
    bounds = type(layers[0]).share_between_layers(layers, 8)
    assert len(bounds) == (1 if share else 2)
    for layer, mixer in enumerate(layers):
        for inner in mixer.mixers:
            torch.testing.assert_close(inner._lower_bound(), torch.full((8,), layer / 3))
