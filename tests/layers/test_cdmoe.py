"""Experts by product keys: the retrieval, each token alone, gradients from the first step on, balancing."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from anymixer.errors import UserError
from anymixer.layers import cdmoe
from anymixer.layers.cdmoe import CDMoE, candidate_pairs, retrieve, take_balance_losses
from anymixer.layers.channel_mixers import channel_mixers

SMALL = {"d_ff": 12, "d_private_expert_retrieval": 6, "n_experts": 25, "n_experts_heads": 2, "n_experts_per_head": 3}


def make(**options):
    torch.manual_seed(0)
    return CDMoE(8, "silu", **SMALL | options).double()


def test_retrieval_is_that_of_the_table_of_all_sums():
    for keys, keep in ((5, 1), (5, 3), (5, 7), (5, 25), (128, 64)):
        first, second = torch.randn(2, 20, keys, dtype=torch.float64)
        sums, experts = retrieve(first, second, keep)
        best = (first[:, :, None] + second[:, None]).flatten(1).topk(keep)
        assert torch.equal(sums, best.values) and torch.equal(experts, best.indices)
    assert len(candidate_pairs(64, 128)[0]) == 280


def by_the_equations(module, x):
    """One token and head after the other, over the table of all experts."""
    inner = module.gate_up.weight @ x
    total = module.down.weight @ (F.silu(inner[:12]) * inner[12:])
    queries = (module.query.weight @ x).view(2, 2, 3)
    for head in range(2):
        first, second = (module.keys[head, half] @ queries[head, half] for half in range(2))
        sums = (first[:, None] + second[None]).flatten()
        chosen = sums.argsort(descending=True)[:3]
        for weight, expert in zip(sums[chosen].softmax(0), chosen):
            total = total + weight * F.silu(x @ module.expert_down[expert]) * module.expert_up[expert]
    return total


def test_it_computes_the_equations_in_pieces_of_any_size(monkeypatch):
    module, hidden = make(), torch.randn(2, 7, 8, dtype=torch.float64)
    for budget in (1, 100, 10**6):
        monkeypatch.setattr(cdmoe, "_GATHERED", budget)
        expected = torch.stack([torch.stack([by_the_equations(module, x) for x in row]) for row in hidden])
        torch.testing.assert_close(module(hidden), expected, rtol=1e-9, atol=1e-12)
        weight = torch.randn_like(expected)
        parameters = list(module.parameters())
        for ours, theirs in zip(
            *(torch.autograd.grad((y * weight).sum(), parameters) for y in (module(hidden), expected))
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_tokens_and_rows_are_independent():
    module, hidden = make(), torch.randn(3, 7, 8, dtype=torch.float64)
    changed = hidden.clone()
    changed[1, 4] = torch.randn(8)
    same = torch.ones(3, 7, dtype=torch.bool)
    same[1, 4] = False
    assert torch.equal(module(hidden)[same], module(changed)[same])
    torch.testing.assert_close(module(hidden[2:, 3:5]), module(hidden)[2:, 3:5], rtol=1e-12, atol=1e-14)


def test_queries_and_keys_learn_from_the_first_step_and_tokens_choose_differently():
    module, hidden = make(), torch.randn(4, 50, 8, dtype=torch.float64)
    module(hidden).square().sum().backward()
    assert module.query.weight.grad.abs().min() > 0
    assert (module.keys.grad != 0).any(-1).all()
    assert len(module.route(hidden.flatten(0, 1))[1].unique()) > 20


def test_balancing_is_part_of_training_alone_and_makes_uses_alike():
    module, hidden = make(load_balancing=1.0), torch.randn(1, 200, 8, dtype=torch.float64)
    module.eval()(hidden)
    assert take_balance_losses(module) is None and take_balance_losses(make()) is None
    with torch.no_grad():
        module.keys[:, :, 0] *= 8
    optimizer = torch.optim.Adam([module.query.weight, module.keys], lr=0.02)
    losses = []
    for _ in range(60):
        module.train()(hidden)
        losses.append(take_balance_losses(module))
        assert take_balance_losses(module) is None
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[0] > 1.2 and losses[-1] < 1.05


def test_a_layer_that_runs_again_in_the_backward_pass_keeps_nothing():
    module, hidden = make(load_balancing=1.0).train(), torch.randn(2, 7, 8, dtype=torch.float64)
    gradients = []
    for run in (module, lambda x: checkpoint(module, x, use_reentrant=False)):
        loss = run(hidden).square().sum() + take_balance_losses(module)
        gradients.append(torch.autograd.grad(loss, module.keys)[0])
        assert module.balance_loss is None
    assert torch.equal(*gradients)


def test_a_balance_without_gradient_is_refused():
    module, hidden = make(load_balancing=1.0).train(), torch.randn(2, 7, 8, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        module(hidden)
        assert take_balance_losses(module) > 0
    output = checkpoint(module, hidden, use_reentrant=True)
    with pytest.raises(UserError, match="use_reentrant=True drops its gradient"):
        output.sum().backward()


def test_balancing_compiles_whole():
    torch._dynamo.reset()
    module, hidden = make(load_balancing=1.0).train(), torch.randn(2, 7, 8, dtype=torch.float64)
    torch.compile(module, backend="eager", fullgraph=True)(hidden)
    found = take_balance_losses(module)
    module(hidden)
    torch.testing.assert_close(found, take_balance_losses(module))


def test_experts_that_a_token_does_not_choose_are_idle():
    module = make()
    assert module.idle_weights() == module.expert_down.numel() + module.expert_up.numel() - 2 * 3 * (8 + 8)


def test_balance_is_one_when_all_keys_are_alike():
    logits = torch.zeros(2, 1, 9, 3)
    experts = torch.arange(9)[None, :, None]
    assert float(cdmoe._imbalance(logits, experts)) == pytest.approx(1.0)


def test_bfloat16_autocast_stays_close():
    module, hidden = make(n_experts_per_head=25).float(), torch.randn(2, 7, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = module(hidden)
    assert (low.float() - module(hidden)).norm() < 2e-2 * module(hidden).norm()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_experts": 16348}, "16348 is no square number.*; take 16129 or 16384"),
        ({"num_experts": 4}, "experts_per_head: 8 is more than num_experts"),
        ({"retrieval_dim": 7}, "retrieval_dim: 7 is not an even"),
        ({"num_heads": 0}, "num_heads: 0 is below 1"),
        ({"load_balancing": -1.0}, "load_balancing: -1.0 is below 0"),
    ],
)
def test_options_that_do_not_fit_are_named_before_anything_is_built(options, message):
    with pytest.raises(UserError, match=message):
        channel_mixers.parse({"name": "cdmoe", **options}, "channel_mixer")
    with pytest.raises(UserError, match="act_fn: 'tanh' is none of"):
        CDMoE(8, "tanh", **SMALL)
