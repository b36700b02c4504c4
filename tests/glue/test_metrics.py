"""GLUE's metrics against cases worked out by hand, and through the `evaluate` library's own front door."""

import math
from pathlib import Path

import evaluate
import numpy as np
import pytest

from anymixer.glue.metrics import majority_metrics, task_metrics
from anymixer.glue.tasks import TASKS

MODULE = Path(__file__).parents[2] / "src/anymixer/glue/glue_metric.py"

# True positives 3, false positives 1, false negatives 2, true negatives 4.
PREDICTED = [1, 1, 1, 1, 0, 0, 0, 0, 0, 0]
TRUE = [1, 1, 1, 0, 1, 1, 0, 0, 0, 0]


def test_accuracy_and_f1_by_hand():
    metrics = task_metrics(TASKS["mrpc"], PREDICTED, TRUE)
    # precision 3/4, recall 3/5, F1 = 2 * 0.75 * 0.6 / 1.35
    assert metrics == pytest.approx({"accuracy": 0.7, "f1": 2 / 3})
    assert task_metrics(TASKS["qqp"], PREDICTED, TRUE) == metrics
    assert task_metrics(TASKS["sst2"], PREDICTED, TRUE) == pytest.approx({"accuracy": 0.7})


def test_matthews_correlation_by_hand():
    # (3*4 - 1*2) / sqrt(4 * 5 * 5 * 6)
    expected = 10 / math.sqrt(600)
    assert task_metrics(TASKS["cola"], PREDICTED, TRUE) == pytest.approx({"matthews_correlation": expected})


def test_three_classes():
    assert task_metrics(TASKS["mnli"], [0, 1, 2, 2], [0, 1, 1, 2]) == {"accuracy": 0.75}


def test_correlations_by_hand():
    # Deviations (-1.5, -0.5, 0.5, 1.5) and (-2, -1, 0, 3): covariance 8, squares 5 and 14. Ranks agree.
    metrics = task_metrics(TASKS["stsb"], [1.0, 2.0, 3.0, 4.0], [0.0, 1.0, 2.0, 5.0])
    assert metrics == pytest.approx({"pearson": 8 / math.sqrt(5 * 14), "spearmanr": 1.0})
    # Ranks (1, 2, 3, 4) and, with a tie, (1.5, 1.5, 4, 3): covariance 3.5, squares 5 and 4.5.
    tied = task_metrics(TASKS["stsb"], [1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 5.0, 2.0])["spearmanr"]
    assert tied == pytest.approx(3.5 / math.sqrt(5 * 4.5))


def test_a_model_that_answers_the_same_always_is_worth_nothing():
    assert task_metrics(TASKS["stsb"], [2.0] * 4, [0.0, 1.0, 2.0, 5.0]) == {"pearson": 0.0, "spearmanr": 0.0}
    assert task_metrics(TASKS["cola"], [1] * 4, [0, 1, 1, 1]) == {"matthews_correlation": 0.0}
    assert task_metrics(TASKS["mrpc"], [0] * 4, [0, 1, 1, 1]) == {"accuracy": 0.25, "f1": 0.0}


def test_majority_baselines():
    assert majority_metrics(TASKS["mrpc"], [1, 1, 0], [1, 1, 1, 0]) == pytest.approx({"accuracy": 0.75, "f1": 6 / 7})
    assert majority_metrics(TASKS["rte"], [1, 0, 0], [1, 1, 1, 0]) == {"accuracy": 0.25}
    assert majority_metrics(TASKS["stsb"], [1.0, 4.0], [0.0, 5.0]) == {"pearson": 0.0, "spearmanr": 0.0}


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ([0, 1], [0], "predictions for"),
        ([], [], "predictions for"),
        ([0.0, math.nan], [1.0, 2.0], "not a finite number"),
    ],
)
def test_no_score_without_an_answer_for_each(predictions, references, message):
    with pytest.raises(ValueError, match=message):
        task_metrics(TASKS["stsb"], predictions, references)


def test_the_module_loads_through_evaluate(tmp_path, monkeypatch):
    monkeypatch.setattr("evaluate.config.HF_MODULES_CACHE", str(tmp_path / "modules"))
    metric = evaluate.load(str(MODULE), "mrpc", cache_dir=str(tmp_path))
    assert metric.compute(predictions=PREDICTED, references=TRUE) == pytest.approx({"accuracy": 0.7, "f1": 2 / 3})


def test_the_score_is_the_mean_over_sets_and_metrics():
    assert TASKS["mnli"].score({"mnli/accuracy": 0.8, "mnli-mm/accuracy": 0.6, "mnli/loss": 9.0}) == pytest.approx(0.7)
    assert TASKS["mnli"].score({"mnli/accuracy": 0.8}) == pytest.approx(0.8)
    assert TASKS["mrpc"].score({"mrpc/accuracy": 0.5, "mrpc/f1": 1.0}) == pytest.approx(0.75)
    with pytest.raises(ValueError, match="no score"):
        TASKS["mrpc"].score({"mrpc/accuracy": np.nan, "mrpc/f1": 1.0})
