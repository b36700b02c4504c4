"""Optimizers by name, and the parameter groups that hints of the model's modules ask for."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from anymixer.layers.param_hints import ParamHint
from anymixer.training.named_table import NamedTable, check_kwargs

if TYPE_CHECKING:
    from anymixer.training.trainer_config import OptimizerConfig

OPTIMIZERS = NamedTable(
    section="optimizer",
    factories={
        "adamw": "torch.optim:AdamW",
        "decoupled_adamw": "anymixer.training.decoupled_adamw:DecoupledAdamW",
        "stableadamw": "optimi:StableAdamW",
    },
    packages={"stableadamw": "optimi"},
    one_name=True,
)

# Set by the fields of OptimizerConfig, or of no use under a Trainer: not allowed among its `options`.
_NOT_OPTIONS = ("params", "lr", "betas", "eps", "weight_decay", "gradient_release")


def optimizer_factory(config: "OptimizerConfig") -> Callable[..., Optimizer]:
    """Return the class that `config` names. Raises UserError for an unknown name or option."""
    factory = OPTIMIZERS.factory(config.name)
    check_kwargs(factory, config.options, "optimizer.options", supplied=_NOT_OPTIONS)
    return factory


def build_optimizer(config: "OptimizerConfig", model: nn.Module, *, fused: bool = False) -> Optimizer:
    """Build the optimizer over all trainable parameters of `model`, in the groups of `parameter_groups`.

    fused: whether all parameters are updated in one kernel, on a GPU. Left to themselves, torch's optimizers step
        through sharded parameters one by one, and torch-optimi 0.3 takes its Triton kernels on a CPU too, and fails.
    """
    factory = optimizer_factory(config)
    # torch chooses where `fused` is None.
    options = ({"triton": fused} if config.name == "stableadamw" else {"fused": fused or None}) | config.options
    return factory(
        parameter_groups(model, weight_decay=config.weight_decay),
        lr=config.lr,
        betas=tuple(config.betas),
        eps=config.eps,
        weight_decay=config.weight_decay,
        **options,
    )


def parameter_groups(model: nn.Module, *, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters by weight decay and learning rate.

    Vectors and scalars (biases, norm weights) are never decayed. For the rest, and for a learning rate
    of its own, a parameter follows the `param_hints()` of the modules it lies in.

    Returns:
        Groups for a torch optimizer, in a fixed order: the decayed, the not decayed, then those with a
        learning rate of their own. A schedule multiplies the rate of every group alike.
    """
    hints = collect_hints(model)
    groups: dict[tuple[float | None, bool], list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            hint = hints.get(id(parameter), ParamHint())
            groups.setdefault((hint.lr, hint.weight_decay and parameter.ndim >= 2), []).append(parameter)
    order = sorted(groups, key=lambda key: (key[0] is not None, key[0] or 0.0, not key[1]))
    return [_group(groups[lr, decay], lr, weight_decay if decay else 0.0) for lr, decay in order]


def _group(parameters: list[nn.Parameter], lr: float | None, weight_decay: float) -> dict[str, Any]:
    group: dict[str, Any] = {"params": parameters, "weight_decay": weight_decay}
    return group if lr is None else group | {"lr": lr}


def collect_hints(model: nn.Module) -> dict[int, ParamHint]:
    """Return all modules' hints by `id` of the parameter; an outer module's go before an inner one's."""
    hints: dict[int, ParamHint] = {}
    for module in model.modules():
        for name, hint in getattr(module, "param_hints", dict)().items():
            hints.setdefault(id(module.get_parameter(name)), hint)
    return hints
