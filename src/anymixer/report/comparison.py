"""What a comparison of runs reached: a table for the terminal, results.{json,csv,md}, and loss.png."""

import csv
import dataclasses
import io
import itertools
import json
import math
from collections.abc import Iterable, Sequence
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

COLUMNS = ("run", "loss", "perplexity", "accuracy", "parameters", "tokens/s", "peak memory")
# exp of more than this is no float64.
_LARGEST_LOSS = 709.0
# Training losses are shown as a running mean over this share of the steps.
_WINDOW = 1 / 20


@dataclass(frozen=True)
class Result:
    """What one run reached. loss, train_loss: nats per predicted token. accuracy: share of the predicted tokens.

    tokens: read in training. tokens_per_second: of the median step. causal: whether the next token is predicted, not
    masked ones. curve: the lines of its metrics.jsonl.
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
    causal: bool = False
    curve: tuple[dict[str, Any], ...] = dataclasses.field(default=(), repr=False)

    @property
    def perplexity(self) -> float:
        """exp of the loss; infinite where that is too large for a number."""
        return math.exp(self.loss) if self.loss < _LARGEST_LOSS or math.isnan(self.loss) else math.inf

    def cells(self, name: str) -> dict[str, str]:
        """The row of the table, as text, by column; name: how the run is called there."""
        speed = "" if self.tokens_per_second is None else f"{self.tokens_per_second:,.0f}"
        memory = "" if self.peak_memory_bytes is None else f"{self.peak_memory_bytes / 2**30:.2f} GiB"
        values = (f"{self.loss:.3f}", f"{self.perplexity:,.1f}", f"{self.accuracy:.1%}", f"{self.parameters:,}")
        return dict(zip(COLUMNS, (name, *values, speed, memory)))

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
    """One row a run, the best first; loss, perplexity and accuracy are of held-out text."""
    from rich.table import Table

    table = Table(title="held-out text after training", title_justify="left")
    columns, *rows = _rows(best_first(results))
    for column in columns:
        first = column == columns[0]
        table.add_column(column, justify="left" if first else "right", overflow="fold", no_wrap=not first)
    for row in rows:
        table.add_row(*row)
    return table


def _rows(results: Sequence[Result]) -> list[tuple[str, ...]]:
    """The table's heads and cells; perplexity is a column where all runs predict the next token."""
    shown = [column for column in COLUMNS if column != "perplexity" or all(result.causal for result in results)]
    cells = [result.cells(name) for result, name in zip(results, short_names(results))]
    return [tuple(shown), *(tuple(row[column] for column in shown) for row in cells)]


def _markdown(results: Sequence[Result]) -> str:
    heads, *rows = _rows(results)
    return markdown_table(heads, rows)


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose first column is text and whose others are numbers."""
    lines = [heads, ("---", *("---:" for _ in heads[1:])), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


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
    tasks = {"next-token" if result.causal else "masked-LM" for result in results}
    axes.set_ylabel(" or ".join(sorted(tasks)) + " loss (nats)")
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
