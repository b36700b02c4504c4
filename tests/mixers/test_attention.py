"""Attention's positions against their closed forms, and its decoding against its own rows."""

import pytest
import torch

from anymixer.layers.positions import alibi_bias, alibi_slopes, apply_rotary
from anymixer.mixers import build_mixer


def test_rotary_scores_depend_on_distance_alone():
    torch.manual_seed(0)
    q, k = torch.randn(2, 8, dtype=torch.float64)
    long = torch.zeros(1, 1, 50, 8, dtype=torch.float64)
    scores = []
    for start in (0, 30):
        rows_q, rows_k = long.clone(), long.clone()
        rows_q[0, 0, start + 5], rows_k[0, 0, start + 12] = q, k
        rotated_q, rotated_k = (apply_rotary(t, 10000.0)[0, 0] for t in (rows_q, rows_k))
        scores.append(rotated_q[start + 5] @ rotated_k[start + 12])
    torch.testing.assert_close(scores[0], scores[1])


def test_rotary_turns_the_first_pair_by_one_radian_a_step():
    x = torch.zeros(1, 1, 3, 4, dtype=torch.float64)
    x[..., 0] = 1.0
    turned = apply_rotary(x, 10000.0)[0, 0]
    steps = torch.arange(3, dtype=torch.float64)
    torch.testing.assert_close(turned[:, 0], steps.cos())
    torch.testing.assert_close(turned[:, 2], steps.sin())


def test_alibi_slopes_of_eight_and_twelve_heads():
    assert alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    assert alibi_slopes(12)[8:] == [2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5]


def test_alibi_bias_is_symmetric_and_zero_on_the_diagonal():
    bias = alibi_bias(4, 5, torch.device("cpu"), torch.float32)
    assert torch.equal(bias, bias.transpose(-1, -2))
    assert bias[0, 1, 0, 4] == -4 * alibi_slopes(4)[1]
    assert (bias.diagonal(dim1=-2, dim2=-1) == 0).all()


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("positions", ["none", "rotary", "alibi"])
def test_decoding_gives_the_rows_of_the_forward_pass(positions, kv_heads):
    torch.manual_seed(0)
    options = {"num_heads": 4, "num_kv_heads": kv_heads, "positions": positions, "causal": True}
    mixer = build_mixer({"name": "attention", **options}, 32).double().eval()
    hidden = torch.randn(3, 9, 32, dtype=torch.float64)
    rows, state = mixer.prefill(hidden[:, :4])
    steps = []
    for token in hidden[:, 4:].unbind(1):
        row, state = mixer.step(token, state)
        steps.append(row)
    torch.testing.assert_close(torch.cat([rows, torch.stack(steps, 1)], 1), mixer(hidden))
