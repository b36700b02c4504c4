"""Dynamic mask attention as a mixer: what it computes, what its cache holds, what it refuses."""

import pytest
import torch
from torch.nn.functional import softplus

from anymixer.errors import UserError
from anymixer.layers.packing import make_packing
from anymixer.mixers import build_mixer
from anymixer.mixers.base import as_causal, state_bytes


def make(dtype=torch.float64, **options):
    torch.manual_seed(0)
    mixer = build_mixer({"name": "dma", "num_heads": 4, "causal": True, **options}, 32).to(dtype).eval()
    torch.nn.init.normal_(mixer.A)
    return mixer


def by_the_equations(mixer, hidden):
    """Equations of the paper, one query after the other, with a sort a row; rotary positions as complex numbers."""
    heads, kv, p = mixer.num_heads, mixer.num_kv_heads, mixer.headdim
    q, k, v = (hidden[0] @ mixer.qkv_proj.weight.T).split([heads * p, kv * p, kv * p], -1)
    bias = (mixer.A * softplus(v @ mixer.dt_proj.weight.T)).exp()
    pair = torch.arange(p // 2, dtype=torch.float64)
    angle = torch.arange(len(q))[:, None] * 10000.0 ** (-pair / (p // 2))
    turn = torch.polar(torch.ones_like(angle), angle)[:, None].to(torch.complex128)

    def rotated(x):
        pairs = torch.complex(*x.view(len(x), -1, p).split(p // 2, -1)) * turn
        return torch.cat([pairs.real, pairs.imag], -1)

    q, k, v = rotated(q), rotated(k), v.view(len(v), kv, p)
    rows = []
    for t in range(len(q)):
        row = []
        for h in range(heads):
            g = h // (heads // kv)
            order = sorted(range(t + 1), key=lambda j: (bias[j, g].item(), j))
            kept = order[-mixer.config.keep_window_size :]
            scores = k[kept, g] @ q[t, h] / p**0.5 + bias[kept, g]
            row.append(scores.softmax(0) @ v[kept, g])
        rows.append(torch.cat(row))
    return (torch.stack(rows) @ mixer.out_proj.weight.T)[None]


@pytest.mark.parametrize("keep", [5, 64, 200])
def test_it_computes_the_equations(keep):
    mixer = make(num_kv_heads=2, keep_window_size=keep)
    hidden = torch.randn(1, 150, 32, dtype=torch.float64)
    torch.testing.assert_close(mixer(hidden), by_the_equations(mixer, hidden), rtol=1e-10, atol=1e-12)


def test_decoding_far_beyond_the_window_gives_what_forward_gives_from_a_state_that_does_not_grow():
    mixer = make(num_kv_heads=2, keep_window_size=7)
    hidden = torch.randn(2, 120, 32, dtype=torch.float64)
    expected = mixer(hidden)
    _, state = mixer.prefill(hidden[:, :50])
    size = state_bytes(state)
    for place in range(50, 120):
        output, state = mixer.step(hidden[:, place], state)
        torch.testing.assert_close(output, expected[:, place], rtol=1e-10, atol=1e-12)
        assert state["k"].shape == (2, 2, 7, 8) and state_bytes(state) == size


def test_padding_on_the_left_takes_no_entry_from_a_full_cache():
    mixer = make(keep_window_size=4)
    alone, more = torch.randn(1, 9, 32, dtype=torch.float64), torch.randn(1, 8, 32, dtype=torch.float64)
    row = torch.cat([100 * torch.randn(1, 5, 32, dtype=torch.float64), alone], 1)
    for real in (2, 9):
        mask = torch.tensor([[0] * (14 - real) + [1] * real])
        _, state = mixer.prefill(row, make_packing(mask, None))
        expected = mixer(torch.cat([alone[:, 9 - real :], more], 1))[:, real:]
        for place in range(8):
            output, state = mixer.step(more[:, place], state)
            torch.testing.assert_close(output, expected[:, place], rtol=1e-10, atol=1e-12)


def test_a_token_s_output_does_not_know_the_future_to_the_bit():
    mixer = make(torch.float32, keep_window_size=6)
    hidden = torch.randn(1, 150, 32)
    changed = torch.cat([hidden[:, :100], 10 * torch.randn(1, 50, 32)], 1)
    assert torch.equal(mixer(hidden)[:, :100], mixer(changed)[:, :100])


def test_of_equal_tokens_steps_keep_those_that_forward_keeps():
    mixer = make(torch.float32, num_kv_heads=2, keep_window_size=9)
    hidden = torch.randn(3, 32)[torch.randint(0, 3, (2, 150))]
    expected = mixer(hidden)
    _, state = mixer.prefill(hidden[:, :75])
    for place in range(75, 150):
        output, state = mixer.step(hidden[:, place], state)
        torch.testing.assert_close(output, expected[:, place], rtol=1e-4, atol=1e-5)


def test_at_first_it_is_attention_in_a_sliding_window():
    mixer = make(keep_window_size=3)
    mixer.reset_own_parameters()
    matrix = mixer.matrix(torch.randn(1, 9, 32, dtype=torch.float64))
    ones = torch.ones(9, 9, dtype=torch.bool)
    assert torch.equal(matrix != 0, (ones.tril() & ~ones.tril(-3)).expand_as(matrix))


def test_dropout_acts_in_training_alone():
    mixer = make(dropout=0.5, keep_window_size=6)
    hidden = torch.randn(1, 90, 32, dtype=torch.float64)
    expected = mixer(hidden)
    assert torch.equal(mixer(hidden), expected)
    assert not torch.allclose(mixer.train()(hidden), expected)


def test_an_encoder_s_has_no_state():
    mixer = make(causal=False)
    with pytest.raises(NotImplementedError, match="causal: false"):
        mixer.prefill(torch.randn(1, 3, 32, dtype=torch.float64))
    assert as_causal("dma", 64)["causal"] is True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "mixer.num_heads: 5 does not divide"),
        ({"num_kv_heads": 3}, "mixer.num_kv_heads: 3 does not divide the 4 heads"),
        ({"keep_window_size": 0}, "mixer.keep_window_size: 0 is below 1"),
        ({"num_heads": 32}, "mixer.num_heads: rotary positions need an even head size, not 1"),
        ({"dropout": 1.0}, "mixer.dropout: 1.0 is not in"),
    ],
)
def test_options_that_do_not_fit_are_named(options, message):
    with pytest.raises(UserError, match=message):
        build_mixer({"name": "dma", "num_heads": 4, **options}, 32)


class Adapted(torch.nn.Module):
    """A projection with an adapter beside it, as LoRA has them."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.down, self.up = (
            torch.nn.Linear(base.in_features, 2, bias=False),
            torch.nn.Linear(2, base.out_features, bias=False),
        )

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("options", [{}, {"key_bias": "linear", "bias": True, "num_kv_heads": 2}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_adapters_beside_the_projections_count_as_if_they_were_merged(options, dtype):
    mixer, hidden = make(keep_window_size=5, **options), torch.randn(1, 30, 32, dtype=torch.float64)
    merged = make(keep_window_size=5, **options)
    for name in ("qkv_proj", "dt_proj"):
        adapted = Adapted(getattr(mixer, name)).double()
        setattr(mixer, name, adapted)
        getattr(merged, name).weight.data += adapted.up.weight.data @ adapted.down.weight.data
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-4}[dtype]
    output = mixer.to(dtype)(hidden.to(dtype))
    torch.testing.assert_close(output.double(), merged(hidden), rtol=tolerance, atol=tolerance)
    output.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for name, p in mixer.named_parameters() if "up" in name)
