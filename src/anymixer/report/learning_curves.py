"""The learning curves of a GLUE run: score on the validation set against steps, a panel a task, a line a seed."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from anymixer.glue.spec import JobResult
from anymixer.glue.summary import Summary, TaskSummary
from anymixer.report.figures import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVES_NAME = "learning_curves.png"
_COLUMNS = 3


def write_learning_curves(summary: Summary, folder: Path) -> Path | None:
    """Write the plot into `folder` and return the file; None where no job has finished."""
    if not summary.tasks:
        return None
    save_figure(draw_learning_curves(summary.tasks), folder / CURVES_NAME)
    return folder / CURVES_NAME


def draw_learning_curves(tasks: Sequence[TaskSummary]) -> "Figure":
    """One panel a task: evaluations as a line a seed, the score that counts as a dot, the majority's dashed."""
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.1 * rows), dpi=110, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes, task in zip(panels, tasks):
        for result in task.results:
            _draw_job(axes, result)
        axes.axhline(100 * task.baseline, color="grey", linestyle="--", linewidth=1, label="majority")
        axes.set_title(f"{task.task}: {100 * task.score:.1f}", fontsize=10)
        axes.set_xlabel("step", fontsize=8)
        axes.locator_params(axis="x", integer=True)
        axes.set_ylabel("score (%)", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3, linewidth=0.5)
        axes.legend(fontsize=7)
    for axes in panels[len(tasks) :]:
        axes.set_visible(False)
    return figure


def _draw_job(axes: "Axes", result: JobResult) -> None:
    steps = [evaluation["step"] for evaluation in result.evaluations]
    scores = [100 * evaluation["score"] for evaluation in result.evaluations]
    (line,) = axes.plot(steps, scores, marker=".", linewidth=1.2, label=f"seed {result.seed}")
    counted = result.best if result.spec.get("select") == "best" else result.last
    axes.plot([counted["step"]], [100 * counted["score"]], "o", color=line.get_color(), markersize=6)
