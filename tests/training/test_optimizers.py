import pytest
import torch
from torch import nn

from anymixer.layers.param_hints import ParamHint
from anymixer.training import OptimizerConfig
from anymixer.training.optimizers import build_optimizer, parameter_groups


class Mixer(nn.Module):
    def __init__(self, hints: bool = True) -> None:
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.A = nn.Parameter(torch.ones(3, 2))
        self.dt = nn.Parameter(torch.ones(3))
        self.hints = {"A": ParamHint(weight_decay=False), "dt": ParamHint(lr=1e-4)} if hints else {}

    def param_hints(self) -> dict[str, ParamHint]:
        return self.hints


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.mixer = Mixer()
        self.norm = nn.LayerNorm(4)
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embed.weight


def names(model: nn.Module, group: dict) -> set[str]:
    ids = {id(parameter) for parameter in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in ids}


def test_groups_follow_shapes_and_hints():
    model = Model()
    decayed, kept, own = parameter_groups(model, weight_decay=0.1)
    assert names(model, decayed) == {"embed.weight", "mixer.proj.weight"}
    assert names(model, kept) == {"mixer.proj.bias", "mixer.A", "norm.weight", "norm.bias", "head.bias"}
    assert names(model, own) == {"mixer.dt"}
    assert [group["weight_decay"] for group in (decayed, kept, own)] == [0.1, 0.0, 0.0]
    assert "lr" not in decayed and "lr" not in kept and own["lr"] == 1e-4


def test_an_outer_hint_goes_before_an_inner_one():
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixer = Mixer()

        def param_hints(self) -> dict[str, ParamHint]:
            return {"mixer.A": ParamHint(lr=1.0), "mixer.dt": ParamHint()}

    model = Outer()
    groups = {group.get("lr"): names(model, group) for group in parameter_groups(model, weight_decay=0.1)}
    assert groups[1.0] == {"mixer.A"}
    assert not any("mixer.dt" in members for lr, members in groups.items() if lr is not None)


def test_a_hint_for_a_parameter_that_is_not_there_is_a_bug():
    model = Mixer()
    model.hints = {"B": ParamHint()}
    with pytest.raises(AttributeError, match="B"):
        parameter_groups(model, weight_decay=0.1)


@pytest.mark.parametrize("name", ["adamw", "decoupled_adamw", "stableadamw"])
def test_the_groups_are_applied_in_a_step(name):
    """With zero gradients a step changes a weight by its decay alone."""
    model = Model()
    lr, decay = 0.5, 0.01
    optimizer = build_optimizer(OptimizerConfig(name=name, lr=lr, weight_decay=decay), model)
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    shrink = 1 - (decay if name == "decoupled_adamw" else lr * decay)
    for key, value in model.named_parameters():
        expected = before[key] * (shrink if key in {"embed.weight", "mixer.proj.weight"} else 1.0)
        torch.testing.assert_close(value.detach(), expected, rtol=1e-6, atol=1e-7, msg=key)


@pytest.mark.parametrize("name", ["adamw", "decoupled_adamw", "stableadamw"])
def test_a_learning_rate_of_its_own_is_applied_in_a_step(name):
    model = Mixer()
    model.hints = {"dt": ParamHint(lr=1e-4), "A": ParamHint(weight_decay=False)}
    optimizer = build_optimizer(OptimizerConfig(name=name, lr=1e-2, weight_decay=0.0), model)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert torch.allclose(model.dt.detach(), torch.tensor(1 - 1e-4), atol=1e-6)
    assert torch.allclose(model.A.detach(), torch.tensor(1 - 1e-2), atol=1e-4)


def test_options_reach_the_optimizer():
    optimizer = build_optimizer(OptimizerConfig(name="adamw", options={"amsgrad": True}), Mixer())
    assert optimizer.defaults["amsgrad"] and optimizer.defaults["betas"] == (0.9, 0.98)


@pytest.mark.parametrize("fused", [False, True])
def test_decoupled_adamw_takes_composers_steps(fused):
    composer_optim = pytest.importorskip("composer.optim")
    config = OptimizerConfig(name="decoupled_adamw", lr=1e-2, weight_decay=0.1)
    ours, theirs = (Model() for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    optimizers = [
        build_optimizer(config, ours, fused=fused),
        composer_optim.DecoupledAdamW(
            parameter_groups(theirs, weight_decay=0.1), lr=1e-2, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1
        ),
    ]
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)) for o in optimizers]
    torch.manual_seed(0)
    for _ in range(5):
        grads = [torch.randn_like(p) for p in ours.parameters()]
        for model in (ours, theirs):
            for parameter, grad in zip(model.parameters(), grads):
                parameter.grad = grad.clone() if parameter.requires_grad else None
        for step in (*optimizers, *schedules):
            step.step()
    for a, b in zip(ours.parameters(), theirs.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
