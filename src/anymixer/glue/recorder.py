"""Watches a job train: its losses and evaluations, when to stop, and the weights of the best evaluation."""

import math
from collections.abc import Collection
from typing import Any

from composer.core import Callback, State
from composer.loggers import Logger
from torch import Tensor, nn

from anymixer.glue.tasks import Task


class LossNotFinite(RuntimeError):
    """The loss became NaN or infinite: the job has failed and has no result."""


class JobRecorder(Callback):
    """Collect what a `JobResult` holds of the training.

    sets: names of the validation sets, each of which an evaluation goes through. patience, min_delta: stop after so
    many evaluations without a score higher than the best by more than `min_delta`; None never stops. keep_best:
    whether to keep the weights of the best evaluation, in main memory.
    """

    def __init__(
        self,
        task: Task,
        sets: Collection[str],
        *,
        steps_per_epoch: int,
        patience: int | None = None,
        min_delta: float = 0.0,
        keep_best: bool = False,
    ) -> None:
        self.task = task
        self.sets = frozenset(sets)
        self.steps_per_epoch = steps_per_epoch
        self.patience = patience
        self.min_delta = min_delta
        self.keep_best = keep_best
        self.losses: list[float] = []
        self.evaluations: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {}
        self.best_weights: dict[str, Tensor] | None = None
        self._waited_for = -math.inf
        self._without_gain = 0
        self._pending: dict[str, dict[str, float]] = {}

    def batch_end(self, state: State, logger: Logger) -> None:
        """Note the step's loss. Raises LossNotFinite for one that is none."""
        loss = float((state.total_loss_dict or {}).get("loss/train/total", math.nan))
        self.losses.append(loss)
        if not math.isfinite(loss):
            rates = ", ".join(f"{rate:g}" for rate in sorted({r for s in state.schedulers for r in s.get_last_lr()}))
            raise LossNotFinite(
                f"{self.task.name}: the loss is {loss} at step {len(self.losses)} (learning rate {rates}); "
                "a lower one, or gradient clipping, may help"
            )

    def eval_end(self, state: State, logger: Logger) -> None:
        """Note one validation set's metrics, and with the last of them the evaluation."""
        step = int(state.timestamp.batch)
        if self.evaluations and self.evaluations[-1]["step"] == step:
            return
        label = str(state.dataloader_label)
        self._pending[label] = {name: float(value) for name, value in state.eval_metric_values.items()}
        if self._pending.keys() == self.sets:
            metrics = {f"{name}/{m}": v for name, values in self._pending.items() for m, v in values.items()}
            self._pending = {}
            self._add(
                state, {"step": step, "epoch": step / self.steps_per_epoch, "score": self.task.score(metrics)}, metrics
            )

    def _add(self, state: State, evaluation: dict[str, Any], metrics: dict[str, float]) -> None:
        evaluation["metrics"] = metrics
        self.evaluations.append(evaluation)
        if not self.best or evaluation["score"] > self.best["score"]:
            self.best = evaluation
            if self.keep_best:
                self.best_weights = weights_of(state.model)
        if evaluation["score"] > self._waited_for + self.min_delta:
            self._waited_for, self._without_gain = evaluation["score"], 0
            return
        self._without_gain += 1
        if self.patience is not None and self._without_gain >= self.patience:
            print(f"stopping early: {self._without_gain} evaluations without a better score", flush=True)
            state.stop_training()


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of a model's weights in main memory."""
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
