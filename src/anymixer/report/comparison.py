"""What a comparison of runs reached: a table for the terminal, results.{json,csv,md}, and loss.png."""

import csv
import dataclasses
import io
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from anymixer.files import write_text_atomic
from anymixer.report.figures import save_figure
from anymixer.training.run_metrics import evaluation

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

COLUMNS = ("run", "loss", "accuracy", "parameters", "tokens/s", "peak memory")
# Training losses are shown as a running mean over this share of the steps.
_WINDOW = 1 / 20


@dataclass(frozen=True)
class Result:
    """What one run reached. loss, train_loss: nats per masked token. accuracy: share of the masked tokens.

    tokens: read in training. tokens_per_second: of the median step. curve: the lines of its metrics.jsonl.
    """

    name: str
    folder: str
    loss: float
    accuracy: float
    train_loss: float | None
    parameters: int
    steps: int
    tokens: int
    tokens_per_second: float | None
    peak_memory_bytes: int | None
    curve: tuple[dict[str, Any], ...] = dataclasses.field(repr=False)

    def cells(self, name: str) -> tuple[str, ...]:
        """The row of the table, as text, under COLUMNS; name: how the run is called there."""
        speed = "" if self.tokens_per_second is None else f"{self.tokens_per_second:,.0f}"
        memory = "" if self.peak_memory_bytes is None else f"{self.peak_memory_bytes / 2**30:.2f} GiB"
        return (name, f"{self.loss:.3f}", f"{self.accuracy:.1%}", f"{self.parameters:,}", speed, memory)

    def record(self) -> dict[str, Any]:
        """All figures but the curve, as plain data."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "curve"}


def best_first(results: Sequence[Result]) -> list[Result]:
    """The results by held-out loss; a run that diverged (NaN) comes last."""
    return sorted(results, key=lambda r: (r.loss != r.loss, r.loss))


def short_names(results: Sequence[Result]) -> list[str]:
    """The runs' names without the words that they all begin with ("demo-mixers-")."""
    words = [result.name.split("-") for result in results]
    shared = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, zip(*words)))
    return ["-".join(rest[shared:]) or result.name for result, rest in zip(results, words)]


def results_table(results: Sequence[Result]) -> "Table":
    """One row a run, the best first; loss and accuracy are of held-out text."""
    from rich.table import Table

    table = Table(title="held-out text after training", title_justify="left")
    for column in COLUMNS:
        first = column == COLUMNS[0]
        table.add_column(column, justify="left" if first else "right", overflow="fold", no_wrap=not first)
    results = best_first(results)
    for result, name in zip(results, short_names(results)):
        table.add_row(*result.cells(name))
    return table


def write_results(results: Sequence[Result], folder: Path) -> list[Path]:
    """Write the table as JSON, CSV and Markdown and the plot of the losses into `folder`; return the files."""
    results = best_first(results)
    records = [result.record() for result in results]
    texts = {
        "results.json": json.dumps(records, indent=2) + "\n",
        "results.csv": _csv(records),
        "results.md": _markdown(results),
    }
    for name, text in texts.items():
        write_text_atomic(folder / name, text)
    save_figure(draw_losses(results), folder / "loss.png")
    return [folder / name for name in (*texts, "loss.png")]


def _csv(records: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def _markdown(results: Sequence[Result]) -> str:
    rows = [
        COLUMNS,
        ("---", *("---:" for _ in COLUMNS[1:])),
        *(r.cells(name) for r, name in zip(results, short_names(results))),
    ]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def draw_losses(results: Sequence[Result]) -> "Figure":
    """Loss against tokens: training as a line (running mean), evaluations as dots of the same colour."""
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5), dpi=110, layout="constrained")
    axes = figure.subplots()
    colours = matplotlib.colormaps["tab10" if len(results) <= 10 else "tab20"]
    for number, (result, name) in enumerate(zip(results, short_names(results))):
        tokens, losses = _training(result)
        label = f"{name}  {result.loss:.3f}"
        axes.plot(tokens, running_mean(losses), color=colours(number), linewidth=1.3, label=label)
        axes.plot(*_evaluations(result), "o", color=colours(number), markersize=4)
    axes.set_xlabel("tokens read")
    axes.set_ylabel("masked-LM loss (nats)")
    axes.set_title("training (line) and held-out (dot)", fontsize=10)
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.legend(
        fontsize=8, title="held-out loss at the end", title_fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5)
    )
    return figure


def _training(result: Result) -> tuple[list[int], NDArray[np.float64]]:
    """Tokens read and loss, step by step."""
    steps = [line for line in result.curve if line.get("loss") is not None]
    return [line["tokens"] for line in steps], np.array([line["loss"] for line in steps])


def _evaluations(result: Result) -> tuple[list[int], list[float]]:
    """Tokens read and held-out loss (the mean over its streams), evaluation by evaluation."""
    tokens_at = {0: 0} | {line["step"]: line["tokens"] for line in result.curve if "tokens" in line}
    steps = sorted({line["step"] for line in result.curve if "eval_loss" in line} & tokens_at.keys())
    losses = [found["loss"] for step in steps if (found := evaluation(result.curve, step))]
    return [tokens_at[step] for step in steps], losses


def running_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Exponential running mean of [steps] over a twentieth of them, without the bias of its start (Adam's)."""
    past = 1 - 1 / max(1.0, len(values) * _WINDOW)
    mean, smoothed = 0.0, np.empty(len(values))
    for step, value in enumerate(values):
        mean = past * mean + (1 - past) * value
        smoothed[step] = mean / (1 - past ** (step + 1))
    return smoothed
