"""What every registered mixer owes: the tests enumerate the registry."""

import pytest
import torch
from anymixer_kernels import force_backend
from mixer_instances import CASES, D_MODEL, OPTIONS, make

from anymixer.errors import UserError
from anymixer.layers.packing import Packing, make_packing
from anymixer.mixers import build_mixer


@pytest.mark.parametrize("spec", CASES)
@pytest.mark.parametrize("length", [1, 2, 31, 140])
def test_shape_and_finite_gradients_everywhere(spec, length):
    mixer = make(spec)
    hidden = torch.randn(2, length, D_MODEL, requires_grad=True)
    out = mixer(hidden)
    assert out.shape == hidden.shape
    out.square().sum().backward()
    assert hidden.grad.isfinite().all()
    for name, p in mixer.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all(), name
        if length > 2:
            assert p.grad.abs().sum() > 0, name


@pytest.mark.parametrize("spec", CASES)
def test_forward_is_output_of_matrix_times_values(spec):
    mixer = make(spec, torch.float64)
    if spec.get("learnable_init_states"):  # what they add is no part of the matrix
        torch.nn.init.zeros_(mixer.init_states)
    hidden = torch.randn(2, 13, D_MODEL, dtype=torch.float64)
    packing = Packing(torch.tensor([[0] * 13, [0] * 5 + [1] * 8]), packed=True)
    for p in (None, packing):
        dense = mixer.output(mixer.matrix(hidden, p) @ mixer.values(hidden, p), hidden, p)
        torch.testing.assert_close(mixer(hidden, p), dense, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("spec", CASES)
@pytest.mark.parametrize("length", [20, 150])
def test_padding_and_neighbours_change_nothing(spec, length):
    mixer = make(spec)
    pieces = [torch.randn(1, n, D_MODEL) for n in (length, 1, 9)]
    alone = [mixer(p) for p in pieces]
    garbage = 100 * torch.randn(1, 7, D_MODEL)

    for left, right in ((0, 7), (0, 3), (4, 0)):
        row = torch.cat([garbage[:, :left], pieces[0], garbage[:, :right]], dim=1)
        mask = torch.tensor([[0] * left + [1] * length + [0] * right])
        padded = mixer(row, make_packing(mask, None))[:, left : left + length]
        torch.testing.assert_close(padded, alone[0], rtol=1e-5, atol=1e-5)

    row = torch.cat([*pieces, garbage], dim=1)
    ids = torch.tensor([[0] * length + [1] + [2] * 9 + [-1] * 7])
    packed = mixer(row, make_packing(None, ids))
    assert packed.isfinite().all()
    for piece, start, end in zip(alone, (0, length, length + 1), (length, length + 1, length + 10)):
        torch.testing.assert_close(packed[:, start:end], piece, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", [case for case in CASES if make(case.values[0]).projects_first])
def test_what_projects_first_needs_no_more_than_autocasts_type(spec):
    mixer = make(spec)
    hidden = torch.randn(2, 13, D_MODEL, dtype=torch.float32)
    packing = Packing(torch.tensor([[0] * 13, [0] * 5 + [1] * 6 + [-1] * 2]), packed=True)
    for p in (None, packing):
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(mixer(hidden.bfloat16(), p), mixer(hidden, p))


@pytest.mark.parametrize("spec", CASES)
def test_the_reference_passes_gradcheck(spec):
    spec = spec | {key: 2 for key in ("qk_dim", "d_state") if key in spec}
    mixer = make(spec | ({"max_seq_len": 6} if "max_seq_len" in spec else {}), torch.float64)
    names, values = zip(*mixer.named_parameters())
    packing = Packing(torch.tensor([[0, 0, 0, 1, 1, -1]]), packed=True)
    real = packing.real[..., None]

    def run(hidden, *parameters):
        output = torch.func.functional_call(mixer, dict(zip(names, parameters)), (hidden, packing))
        return output * real  # rows at padding have no meaning

    hidden = torch.randn(1, 6, D_MODEL, dtype=torch.float64, requires_grad=True)
    with force_backend("reference"):
        assert torch.autograd.gradcheck(run, (hidden, *values), eps=1e-6, atol=1e-5, fast_mode=True)


@pytest.mark.parametrize("spec", CASES)
def test_works_at_four_times_the_length_or_says_why_not(spec):
    mixer = make(spec)
    longest = mixer.config.longest_row()
    if longest is None:
        hidden = torch.randn(1, 4 * 128, D_MODEL)
        assert mixer(hidden).isfinite().all()
        # The matrix at the longer length is one of the same family: what it does to the start does not blow up.
        assert mixer.matrix(hidden).norm() < 10 * 4 * mixer.matrix(hidden[:, :128]).norm()
    else:
        with pytest.raises(UserError, match=f"max_seq_len: a row of {longest + 1} tokens is longer than .* {longest}"):
            mixer(torch.randn(1, longest + 1, D_MODEL))


@pytest.mark.parametrize("spec", CASES)
def test_a_row_of_nothing_but_padding_stays_finite(spec):
    mixer = make(spec)
    hidden = torch.randn(2, 6, D_MODEL, requires_grad=True)
    out = mixer(hidden, make_packing(torch.tensor([[1] * 6, [0] * 6]), None))
    out[0].sum().backward()
    assert out.isfinite().all() and hidden.grad.isfinite().all()


@pytest.mark.parametrize("spec", CASES)
def test_bfloat16_autocast_stays_close(spec):
    mixer = make(spec)
    hidden = torch.randn(2, 40, D_MODEL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = mixer(hidden)
    full = mixer(hidden)
    assert (low.float() - full).norm() / full.norm() < 2e-2


@pytest.mark.parametrize("spec", CASES)
def test_same_seed_same_module_and_layers_differ(spec):
    torch.manual_seed(3)
    first, second = build_mixer(spec, D_MODEL), build_mixer(spec, D_MODEL)
    torch.manual_seed(3)
    again = build_mixer(spec, D_MODEL)
    for (name, a), (_, b) in zip(first.named_parameters(), again.named_parameters()):
        assert torch.equal(a, b), name
    assert any(not torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))


@pytest.mark.parametrize("spec", CASES)
def test_hints_name_real_parameters(spec):
    mixer = make(spec)
    assert set(mixer.param_hints()) <= {name for name, _ in mixer.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("spec", CASES)
def test_compiled_gives_the_same_numbers(spec):
    """The first instance of every mixer through the default compiler, the others through its tracing alone, which
    takes a tenth of the time."""
    torch._dynamo.reset()  # or it gives up, in silence, on a class that it has compiled eight times
    mixer = make(spec)
    first = {"name": spec["name"], **OPTIONS.get(spec["name"], [{}])[0]} == spec
    compiled = torch.compile(mixer, backend="inductor" if first else "eager", fullgraph=True)
    hidden = torch.randn(2, 24, D_MODEL, requires_grad=True)
    results = []
    for function in (mixer, compiled):
        output = function(hidden)
        results.append((output, *torch.autograd.grad(output.square().sum(), hidden)))
    for expected, actual in zip(*results):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
