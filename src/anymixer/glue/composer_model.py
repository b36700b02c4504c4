"""A classifier as Composer trains it: its loss, and GLUE's metrics over whole validation sets."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from anymixer.glue.metrics import task_metrics
from anymixer.glue.tasks import Task
from anymixer.models.sequence_classification import classification_loss, labelled_sequences
from anymixer.training.composer_model import MixerComposerModel


class ClassifierComposerModel(MixerComposerModel):
    """Wrap a model with a sequence classifier, or regressor, for one task.

    A batch is a mapping with `input_ids`, `labels` ([batch], or [batch, sequences] of packed rows) and whatever else
    the model's forward takes.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast | None, task: Task) -> None:
        super().__init__(model, tokenizer)
        self.task = task

    def get_metrics(self, is_train: bool = False) -> dict[str, Metric]:
        """Return new metrics: the mean loss and GLUE's own; none in training."""
        if is_train:
            return {}
        return {"loss": MeanLoss(), **{name: TaskMetric(self.task, name) for name in self.task.metrics}}

    def update_metric(self, batch: Mapping[str, Tensor], outputs: Any, metric: Metric) -> dict[str, Any]:
        """Add the labelled sequences of one batch to a metric."""
        labelled = labelled_sequences(batch["labels"])
        metric.update(outputs.logits[labelled], batch["labels"][labelled])
        return {}

    def flops_per_batch(self, batch: Mapping[str, Tensor]) -> float:
        """Return the floating-point operations of one training step; see MixerComposerModel, less the head."""
        return 6.0 * self.body_weights * batch["input_ids"].numel()


def answers(logits: Tensor) -> Tensor:
    """[examples, num_labels] -> [examples]: the likeliest class, or the one output of a regression, in float32."""
    return logits[:, 0].float() if logits.shape[-1] == 1 else logits.argmax(dim=-1)


class MeanLoss(Metric):
    """The mean of the loss over all examples."""

    full_state_update = False
    total: Tensor
    examples: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", default=torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("examples", default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """logits: [examples, num_labels]; labels: [examples]."""
        self.total += classification_loss(logits, labels) * len(labels)
        self.examples += len(labels)

    def compute(self) -> Tensor:
        """Return the mean."""
        return self.total / self.examples


class TaskMetric(Metric):
    """One of a task's metrics, by its name in `anymixer.glue.metrics`, over everything it was shown."""

    full_state_update = False
    predictions: list[Tensor]
    references: list[Tensor]

    def __init__(self, task: Task, name: str) -> None:
        super().__init__()
        self.task = task
        self.name = name
        self.add_state("predictions", default=[], dist_reduce_fx="cat")
        self.add_state("references", default=[], dist_reduce_fx="cat")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """logits: [examples, num_labels]; labels: [examples]. Raises ValueError where a logit is not finite."""
        if not logits.isfinite().all():
            raise ValueError(f"{self.task.name}: the model's output is not finite (NaN or infinity)")
        self.predictions.append(answers(logits))
        self.references.append(labels)

    def compute(self) -> Tensor:
        """Return the metric as a fraction."""
        predictions, references = (torch.cat(list(s)).cpu().numpy() for s in (self.predictions, self.references))
        value = task_metrics(self.task, predictions, references)[self.name]
        return torch.tensor(value, dtype=torch.float64)
