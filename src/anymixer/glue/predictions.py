"""Test-set predictions in the format of GLUE's submission server: two columns, `index` and `prediction`."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from anymixer.glue.tasks import STSB_RANGE, Task


def submission(task: Task, predictions: NDArray[Any]) -> str:
    """The text of one TSV file; predictions are in the order of the test set, which is what `index` counts.

    Classes are written by name where GLUE wants names, scores with three digits within their range.
    """
    lines = [f"{index}\t{_answer(task, value)}" for index, value in enumerate(predictions)]
    return "\n".join(["index\tprediction", *lines]) + "\n"


def _answer(task: Task, value: Any) -> str:
    if task.regression:
        return f"{np.clip(float(value), *STSB_RANGE):.3f}"
    return task.labels[int(value)] if task.names_in_submission else str(int(value))
