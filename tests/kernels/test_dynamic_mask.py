"""Dynamic mask attention against loops over rows that sort their keys."""

import math

import pytest
import torch
from anymixer_kernels import force_backend
from anymixer_kernels.dynamic_mask import dynamic_mask_attention, extend_cache, fill_cache
from anymixer_kernels.dynamic_mask.key_sets import best_of_each_sequence, key_block
from anymixer_kernels.dynamic_mask.reference import visible_keys
from anymixer_kernels.dynamic_mask.torch_form import causal_blocks

HEADS, KV_HEADS, WIDTH = 4, 2, 6


def kept_keys(scores, allowed, keep):
    """Positions of the `keep` best of the allowed, the later of equal ones, by Python's sort."""
    return sorted(sorted(allowed, key=lambda j: (scores[j], j))[-keep:])


def oracle(q, k, v, bias, keep, causal, ids):
    """[batch, heads, length, width] in Python loops."""
    out = torch.zeros_like(q)
    length = q.shape[2]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            g = h // (q.shape[1] // k.shape[1])
            for t in range(length):
                allowed = [j for j in range(t + 1 if causal else length) if ids[b][j] == ids[b][t]]
                kept = kept_keys(bias[b, g].tolist(), allowed, keep)
                scores = k[b, g, kept] @ q[b, h, t] / math.sqrt(q.shape[-1]) + bias[b, g, kept]
                out[b, h, t] = scores.softmax(0) @ v[b, g, kept]
    return out


def inputs(length, batch=2, dtype=torch.float64, ties=False):
    torch.manual_seed(length)
    q = torch.randn(batch, HEADS, length, WIDTH, dtype=dtype)
    k, v = torch.randn(2, batch, KV_HEADS, length, WIDTH, dtype=dtype)
    bias = torch.randn(batch, KV_HEADS, length, dtype=dtype)
    return q, k, v, bias.round() if ties else bias


IDS = {
    "whole": None,
    "padded": [[-1] * 3 + [0] * 20, [0] * 19 + [-1] * 4],
    "packed": [[0] * 11 + [1] * 12, [-1] * 2 + [0] * 3 + [1] * 16 + [-1] * 2],
}


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("keep", [1, 5, 40])
@pytest.mark.parametrize("rows", IDS)
def test_both_forms_are_the_oracle(rows, keep, causal, ties):
    args = inputs(23, ties=ties)
    ids = None if IDS[rows] is None else torch.tensor(IDS[rows])
    expected = oracle(*args, keep, causal, [[0] * 23] * 2 if ids is None else ids.tolist())
    real = torch.ones(2, 23, dtype=torch.bool) if ids is None else ids >= 0
    for backend in ("reference", "torch"):
        with force_backend(backend):
            mixed = dynamic_mask_attention(*args, keep=keep, causal=causal, sequence_id=ids, packed=rows == "packed")
        assert mixed.isfinite().all()
        difference = (mixed - expected).transpose(1, 2)[real]
        assert difference.abs().max() < 1e-12, backend


@pytest.mark.parametrize("rows", [1, 3, 4, 64])
@pytest.mark.parametrize("packed", [False, True])
def test_blocks_of_any_size_give_the_same_to_the_last_gradient(rows, packed):
    q, k, v, bias = (t.requires_grad_() for t in inputs(23, ties=True))
    ids = torch.tensor(IDS["packed"]) if packed else None
    expected = dynamic_mask_attention_reference(q, k, v, bias, ids)
    scale = WIDTH**-0.5
    with_bias = torch.cat([k, bias[..., None] / scale], -1)
    blocks = causal_blocks(
        torch.cat([q, torch.ones_like(q[..., :1])], -1), with_bias, v, bias, scale, 5, rows, ids, 0.0
    )
    weight = torch.randn_like(expected)
    if packed:
        weight = weight * (ids >= 0)[:, None, :, None]  # rows at padding have no meaning
    torch.testing.assert_close(blocks * weight, expected * weight, rtol=1e-10, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad((o * weight).sum(), (q, k, v, bias)) for o in (blocks, expected))):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def dynamic_mask_attention_reference(q, k, v, bias, ids):
    with force_backend("reference"):
        return dynamic_mask_attention(q, k, v, bias, keep=5, causal=True, sequence_id=ids)


def test_a_key_is_visible_in_one_interval_and_a_block_sees_few_keys():
    scores = torch.randn(1, 2, 200)
    visible = visible_keys(scores, 16, True, None)
    began_or_ended = visible.int().diff(dim=2).clamp(max=0).sum(dim=2)
    assert (began_or_ended >= -1).all()  # once gone, gone for good
    assert (visible.sum(-1) == torch.arange(1, 201).clamp(max=16)).all()
    ids, carried = torch.zeros(1, 200, dtype=torch.int64), torch.arange(16).expand(1, 2, 16)
    for start in range(16, 200, 8):
        block = key_block(scores, ids, carried, start, start + 8, 16)
        assert block.index.shape[-1] == 24
        table = torch.zeros(1, 2, 8, 200, dtype=torch.bool).scatter(
            3, block.index[:, :, None].expand(-1, -1, 8, -1), block.visible
        )
        assert torch.equal(table, visible[:, :, start : start + 8])
        carried = block.carried


def test_the_best_of_each_sequence_are_those_of_its_last_row():
    scores, ids = torch.randn(2, 3, 23).round(), torch.tensor(IDS["packed"])
    kept = best_of_each_sequence(scores, 4, ids)
    assert torch.equal(kept, visible_keys(scores, 4, False, ids).any(dim=2))


def test_equal_biases_are_a_sliding_window():
    visible = visible_keys(torch.ones(1, 1, 9), 3, True, None)[0, 0]
    ones = torch.ones(9, 9, dtype=torch.bool)
    assert torch.equal(visible, ones.tril() & ~ones.tril(-3))


@pytest.mark.parametrize("ties", [False, True])
def test_a_cache_holds_the_keys_of_the_last_row_and_no_more(ties):
    _, k, v, bias = inputs(30, ties=ties)
    real = torch.ones(2, 30, dtype=torch.bool)
    cache = fill_cache(k[:, :, :4], v[:, :, :4], bias[:, :, :4], real[:, :4], 7)
    for t in range(4, 30):
        cache = extend_cache(cache, k[:, :, t : t + 1], v[:, :, t : t + 1], bias[:, :, t : t + 1], 7)
        assert cache["k"].shape[2] == cache["bias"].shape[2] == min(t + 1, 7)
        for b in range(2):
            for g in range(KV_HEADS):
                kept = kept_keys(bias[b, g].tolist(), range(t + 1), 7)
                for name, whole in (("k", k), ("v", v), ("bias", bias)):
                    assert torch.equal(cache[name][b, g], whole[b, g, kept]), (name, t)
        filled = fill_cache(k[:, :, : t + 1], v[:, :, : t + 1], bias[:, :, : t + 1], real[:, : t + 1], 7)
        assert all(torch.equal(cache[name], filled[name]) for name in cache)


def test_a_great_bias_keeps_its_precision_in_bfloat16():
    """In one bfloat16 channel, 200.25 and 200 are the same number."""
    q = torch.zeros(1, 1, 2, 8, dtype=torch.bfloat16)
    v = torch.tensor([[[[1.0] * 8, [0.0] * 8]]], dtype=torch.bfloat16)
    bias = torch.tensor([[[200.25, 200.0]]])
    mixed = dynamic_mask_attention(q, q, v, bias, keep=2, causal=False)
    assert abs(float(mixed[0, 0, 0, 0]) - 1 / (1 + math.exp(-0.25))) < 4e-3
