"""Attention by sequences against attention under a mask, which is the definition."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from anymixer.layers import packed_attention
from anymixer.layers.packed_attention import attend_in_sequences, prefers_sequences
from anymixer.layers.packing import Packing
from anymixer.mixers import attention, build_mixer

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
# Sequences of one token, a row of one sequence, padding at the end, in the middle, and a row of nothing else.
IDS = [[0, 1, 1, 1, 2, 2, -1, -1], [0] * 8, [3, 3, -1, -1, -1, 4, 4, 4], [-1] * 8]


def ids_of(length):
    """IDS, every token of them `length / 8` times."""
    return torch.tensor(IDS, device=DEVICE).repeat_interleave(length // 8, dim=1)


def relative(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize(
    ("dtype", "causal", "tolerance"),
    [
        (torch.float32, False, 1e-5),
        pytest.param(torch.float32, True, 1e-5, marks=pytest.mark.skipif(not ON_GPU, reason="needs a GPU")),
        pytest.param(torch.bfloat16, False, 2e-2, marks=pytest.mark.skipif(not ON_GPU, reason="needs a GPU")),
        pytest.param(torch.bfloat16, True, 2e-2, marks=pytest.mark.skipif(not ON_GPU, reason="needs a GPU")),
    ],
)
def test_the_same_as_under_a_mask_in_float64(dtype, causal, tolerance):
    length = 1024 if ON_GPU else 24
    ids = ids_of(length)
    # As the projection leaves them: parts of one tensor, heads after tokens. A CPU takes no parts.
    projected = torch.randn(len(ids), length, 9, 16, device=DEVICE, dtype=dtype).split(3, dim=2)
    q, k, v = parts = [(part if ON_GPU else part.contiguous()).transpose(1, 2).requires_grad_() for part in projected]
    actual = attend_in_sequences(q, k, v, Packing(ids, packed=True), causal=causal)
    assert actual.dtype == dtype and actual.shape == q.shape

    mask = ids[:, None, :, None] == ids[:, None, None, :]
    # The two stretches of padding of a row may not see each other; neither counts.
    mask = mask.tril() if causal else mask
    exact = [part.detach().double().requires_grad_() for part in parts]
    expected = scaled_dot_product_attention(*exact, attn_mask=mask)
    real = (ids >= 0)[:, None, :, None]
    assert relative(actual * real, expected * real) < tolerance
    weights = torch.randn_like(actual) * real
    grads = torch.autograd.grad(actual, parts, weights)
    for ours, theirs in zip(grads, torch.autograd.grad(expected, exact, weights.double())):
        assert relative(ours, theirs) < tolerance


@pytest.mark.parametrize("packed", [True, False])
def test_a_block_is_the_same_either_way(packed, monkeypatch):
    torch.manual_seed(0)
    mixer = build_mixer({"name": "attention", "num_heads": 4, "num_kv_heads": 2, "positions": "rotary"}, 32).to(DEVICE)
    ids = ids_of(24) if packed else ids_of(24)[:2].clamp(max=0)
    packing, hidden = Packing(ids, packed), torch.randn(len(ids), 24, 32, device=DEVICE)
    expected = mixer(hidden, packing)
    monkeypatch.setattr(attention, "prefers_sequences", lambda q: True)
    actual = mixer(hidden, packing)
    real = (ids >= 0)[..., None]
    torch.testing.assert_close(actual * real, expected * real)


def test_runs_follow_each_other_through_the_batch():
    offsets, longest = Packing(torch.tensor(IDS), packed=True).runs
    assert offsets.tolist() == [0, 1, 4, 6, 8, 16, 18, 21, 24, 32] and longest == 8


def test_short_rows_and_cpus_keep_the_mask():
    q = torch.empty(1, 1, 1024, 64, device=DEVICE)
    assert prefers_sequences(q) == ON_GPU
    assert not prefers_sequences(q[:, :, : packed_attention.MASKED_LENGTH])
    assert not prefers_sequences(q[..., :63])
