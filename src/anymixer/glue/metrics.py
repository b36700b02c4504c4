"""Scores of predictions, by task: a plain function over the `evaluate` module of this package."""

import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anymixer.glue.tasks import Task

Numbers = Sequence[float] | NDArray[Any]


def task_metrics(task: Task, predictions: Numbers, references: Numbers) -> dict[str, float]:
    """GLUE's metrics of a task by name, as fractions (0.5, not 50).

    predictions, references: [examples] class numbers, or scores for regression. Raises ValueError where their numbers
    differ, there are none, or one is not finite.
    """
    predicted, true = np.asarray(predictions), np.asarray(references)
    if predicted.shape != true.shape or predicted.ndim != 1 or not len(true):
        raise ValueError(f"{task.name}: {predicted.shape} predictions for {true.shape} references")
    if not np.isfinite(predicted.astype(np.float64)).all():
        raise ValueError(f"{task.name}: a prediction is not a finite number")
    # Importing evaluate takes seconds.
    from anymixer.glue.glue_metric import GlueMetric

    with tempfile.TemporaryDirectory() as folder:
        metric = GlueMetric(config_name=task.name, keep_in_memory=True, cache_dir=folder)
        values = metric.compute(predictions=predicted, references=true)
    assert values is not None and set(values) == set(task.metrics)
    return {name: float(value) for name, value in values.items()}


def majority_metrics(task: Task, train_labels: Numbers, references: Numbers) -> dict[str, float]:
    """The metrics of answering every example with the commonest label of the training set (regression: its mean)."""
    labels = np.asarray(train_labels)
    answer = labels.mean() if task.regression else np.bincount(labels).argmax()
    return task_metrics(task, np.full(len(references), answer), references)
