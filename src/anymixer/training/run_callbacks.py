"""Callbacks of every run: say what was chosen at the start, keep the configuration in every checkpoint and to it."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from composer.core import Callback, State
from composer.loggers import ConsoleLogger, Logger, ProgressBarLogger
from composer.utils import dist

from anymixer.errors import UserError

_SHOWN = 6
# What torch's optimizers and optimi's keep of OptimizerConfig in a group; `lr` itself moves with the schedule.
_OPTIMIZER_NUMBERS = ("initial_lr", "max_lr", "betas", "beta1", "beta2", "eps", "weight_decay")


def say(text: str) -> None:
    """Print one line on rank 0."""
    if dist.get_global_rank() == 0:
        print(text, flush=True)


class LaunchReport(Callback):
    """Print how the run is launched, and the microbatch size whenever Composer's search changes it."""

    def __init__(self, description: str) -> None:
        self.description = description
        self.microbatch: int | float | None = None

    def fit_start(self, state: State, logger: Logger) -> None:
        """Print the device, the ranks, the precision and the batch sizes."""
        say(self.description)

    def batch_end(self, state: State, logger: Logger) -> None:
        """Print the microbatch size that automatic microbatching settled on."""
        if state.auto_microbatching and state.device_train_microbatch_size != self.microbatch:
            self.microbatch = state.device_train_microbatch_size
            say(f"device_train_microbatch_size: {self.microbatch} fits (step {int(state.timestamp.batch)})")


class RunConfig(Callback):
    """Keep the resolved configuration in every checkpoint, and give it to the loggers.

    It is stored as JSON text under ["state"]["callbacks"]["RunConfig"]["config"], so that a checkpoint of
    shards loads whatever keys a later configuration has. After a resume, the keys that changed are printed.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = json.loads(json.dumps(config, default=str))

    def init(self, state: State, logger: Logger) -> None:
        """Log the configuration as hyperparameters, except to the terminal, which it would fill."""
        for destination in logger.destinations:
            if not isinstance(destination, (ConsoleLogger, ProgressBarLogger)):
                destination.log_hyperparameters(self.config)

    def state_dict(self) -> dict[str, Any]:
        """Return what the checkpoint keeps."""
        return {"config": json.dumps(self.config, sort_keys=True)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Compare with the configuration that wrote the checkpoint.

        Raises UserError for an option of the optimizer that changed: what it has kept was made under the old one.
        """
        changed = changed_keys(json.loads(state["config"]), self.config)
        fixed = [key for key in changed if key.startswith("optimizer.options.")]
        if fixed and not any(key.startswith("optimizer.name:") for key in changed):
            raise UserError(
                f"{fixed[0]}: cannot change in a run that continues; take the old value, or start from the weights "
                "(load_path, load_weights_only=true)"
            )
        if changed:
            more = f" and {len(changed) - _SHOWN} more" if len(changed) > _SHOWN else ""
            say(f"changed since the checkpoint: {', '.join(changed[:_SHOWN])}{more}")


class OptimizerNumbers(Callback):
    """Have a run that continues train with the learning rates, betas, eps and weight decay of its configuration.

    Composer restores the checkpoint's with the optimizer's state. Where none changed, nothing is.
    """

    def __init__(self) -> None:
        self._configured: list[dict[str, Any]] = []

    def before_load(self, state: State, logger: Logger) -> None:
        """Note what the configuration says, of each group."""
        groups = state.optimizers[0].param_groups
        self._configured = [{name: group[name] for name in _OPTIMIZER_NUMBERS if name in group} for group in groups]

    def after_load(self, state: State, logger: Logger) -> None:
        """Set it; where a learning rate changed, the schedule goes on from there."""
        groups = state.optimizers[0].param_groups
        for group, configured in zip(groups, self._configured, strict=True):
            if group["initial_lr"] != configured["initial_lr"]:
                group["lr"] *= configured["initial_lr"] / group["initial_lr"]
            group.update(configured)
        for scheduler in state.schedulers:
            scheduler.base_lrs = [group["initial_lr"] for group in groups]


def changed_keys(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Return "key: old -> new" for every leaf that differs between two nested mappings."""
    old, new = dict(_leaves(before)), dict(_leaves(after))
    keys = [key for key in old | new if old.get(key) != new.get(key)]
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in keys]


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
