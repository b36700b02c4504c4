"""GLUE's metrics as a module of the `evaluate` library, over scikit-learn and SciPy; nothing is downloaded.

    evaluate.load("src/anymixer/glue/glue_metric.py", "mrpc").compute(predictions=[0, 1], references=[0, 1])

`evaluate.load("glue", ...)` fetches the same from the Hub; this file is why a machine without one is enough.
"""

from typing import Any

import datasets
import evaluate
import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

METRICS_OF_TASK = {
    "cola": ("matthews_correlation",),
    "mrpc": ("accuracy", "f1"),
    "qqp": ("accuracy", "f1"),
    "stsb": ("pearson", "spearmanr"),
}
_ACCURACY = ("accuracy",)


def _correlation(function, predictions, references):
    """A correlation with a constant is undefined; such predictions are worth nothing, so they score 0."""
    if np.ptp(predictions) == 0 or np.ptp(references) == 0:
        return 0.0
    return float(function(predictions, references)[0])


_NO_WARNING: Any = {"zero_division": 0}
_FUNCTIONS = {
    "accuracy": lambda predictions, references: float(accuracy_score(references, predictions)),
    # Of class 1, "equivalent" or "duplicate"; 0 where it is neither predicted nor there.
    "f1": lambda predictions, references: float(f1_score(references, predictions, pos_label=1, **_NO_WARNING)),
    "matthews_correlation": lambda predictions, references: float(matthews_corrcoef(references, predictions)),
    "pearson": lambda predictions, references: _correlation(pearsonr, predictions, references),
    "spearmanr": lambda predictions, references: _correlation(spearmanr, predictions, references),
}


class GlueMetric(evaluate.Metric):
    """The metrics of the task that `config_name` names: accuracy unless METRICS_OF_TASK says otherwise."""

    def _info(self):
        dtype = "float32" if self.config_name == "stsb" else "int64"
        return evaluate.MetricInfo(
            description="The metrics of GLUE (arXiv 1804.07461), by task.",
            citation="",
            inputs_description="predictions, references: class numbers, or scores for stsb.",
            features=datasets.Features({"predictions": datasets.Value(dtype), "references": datasets.Value(dtype)}),
            format="numpy",
        )

    def _compute(self, predictions, references):
        names = METRICS_OF_TASK.get(self.config_name, _ACCURACY)
        return {name: _FUNCTIONS[name](predictions, references) for name in names}
