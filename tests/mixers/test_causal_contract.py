"""What every causal mixer owes besides the contract of all mixers: the tests enumerate the registry."""

import pytest
import torch
from mixer_instances import CAUSAL_CASES, D_MODEL, make

from anymixer.layers.packing import make_packing
from anymixer.mixers.base import state_bytes

pytestmark = pytest.mark.parametrize("spec", CAUSAL_CASES)
LENGTH = 19
# A masked score is 0 after the softmax, to the bit, whatever it was; scans may round otherwise.
MASKED = ("attention", "dma")


def test_no_token_sees_a_later_one(spec):
    mixer = make(spec)
    hidden = torch.randn(2, LENGTH, D_MODEL)
    changed = hidden.clone()
    changed[:, 11:] = torch.randn(2, LENGTH - 11, D_MODEL)
    before, after = mixer(hidden)[:, :11], mixer(changed)[:, :11]
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)
    if spec["name"] in MASKED:
        assert torch.equal(after, before)
    assert torch.equal(mixer.matrix(hidden).triu(1), torch.zeros(()).expand_as(mixer.matrix(hidden)))


def test_rows_do_not_see_each_other(spec):
    mixer = make(spec)
    hidden = torch.randn(3, LENGTH, D_MODEL)
    torch.testing.assert_close(mixer(hidden)[1:2], mixer(hidden[1:2]), rtol=1e-5, atol=1e-6)


def test_stepping_gives_what_forward_gives(spec):
    mixer = make(spec)
    hidden = torch.randn(2, LENGTH, D_MODEL)
    state = mixer.init_state(2)
    for place, expected in enumerate(mixer(hidden).unbind(1)):
        output, state = mixer.step(hidden[:, place], state)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("prompt", [1, 7, 18])
def test_prefill_then_steps_give_what_forward_gives(spec, prompt):
    mixer = make(spec)
    hidden = torch.randn(2, LENGTH, D_MODEL)
    expected = mixer(hidden)
    output, state = mixer.prefill(hidden[:, :prompt])
    torch.testing.assert_close(output, expected[:, :prompt], rtol=1e-4, atol=1e-5)
    for place in range(prompt, LENGTH):
        output, state = mixer.step(hidden[:, place], state)
        torch.testing.assert_close(output, expected[:, place], rtol=1e-4, atol=1e-5)


def test_padding_on_the_left_leaves_no_trace(spec):
    mixer = make(spec)
    long, short = torch.randn(1, 9, D_MODEL), torch.randn(1, 5, D_MODEL)
    continuation = torch.randn(2, 6, D_MODEL)
    rows = torch.cat([long, torch.cat([100 * torch.randn(1, 4, D_MODEL), short], dim=1)])
    mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5])
    output, state = mixer.prefill(rows, make_packing(mask, None))
    after = []
    for place in range(6):
        step, state = mixer.step(continuation[:, place], state)
        after.append(step)
    for row, alone in enumerate((long, short)):
        expected = mixer(torch.cat([alone, continuation[row : row + 1]], dim=1))[0]
        length = alone.shape[1]
        torch.testing.assert_close(output[row, 9 - length :], expected[:length], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.stack(after, 1)[row], expected[length:], rtol=1e-4, atol=1e-5)


def bytes_alive(state):
    """What the tensors keep in memory: more than they hold, if one of them is a part of another tensor."""
    return sum(tensor.untyped_storage().nbytes() for tensor in state.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 2, LENGTH])
def test_state_size_is_that_of_the_real_state(spec, length, dtype):
    mixer = make(spec, dtype)
    _, state = mixer.prefill(torch.randn(3, length, D_MODEL, dtype=dtype))
    assert bytes_alive(state) == state_bytes(state) == 3 * mixer.state_size(length, dtype)
    _, state = mixer.step(torch.randn(3, D_MODEL, dtype=dtype), state)
    assert state_bytes(state) == 3 * mixer.state_size(length + 1, dtype)


def test_the_state_passed_in_is_left_as_it_is(spec):
    mixer = make(spec)
    _, state = mixer.prefill(torch.randn(2, 5, D_MODEL))
    before = {name: tensor.clone() for name, tensor in state.items()}
    mixer.step(torch.randn(2, D_MODEL), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in state.items())


def test_a_state_does_not_grow_but_for_attention_and_for_dynamic_masks_within_their_window(spec):
    mixer = make(spec)
    sizes = [state_bytes(mixer.prefill(torch.randn(1, length, D_MODEL))[1]) for length in (20, 80)]
    claimed = [mixer.state_size(length) for length in (20, 80, 128, 65536)]
    assert sizes == claimed[:2]
    if spec["name"] == "dma":
        window = spec.get("keep_window_size", 2048)
        assert (sizes[0] == sizes[1]) == (window <= 20) and mixer.state_size(window) == claimed[3]
    else:
        assert (len(set(claimed)) > 1) == (spec["name"] == "attention")
