"""The report of a GLUE run: a table for the terminal; report.md, report.json, report.csv and submission.zip."""

import csv
import io
import json
import os
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anymixer.files import write_text_atomic
from anymixer.glue.published import PUBLISHED, Published
from anymixer.glue.results import Store
from anymixer.glue.spec import JobResult
from anymixer.glue.summary import GLUE_TASKS, WNLI, Summary, TaskSummary
from anymixer.glue.tasks import TASKS

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = ("task", "score", "std", "n", "best seed", "majority", "metrics")
SUBMISSION_NAME = "submission.zip"
_CSV = ("task", "seed", "reported", "lr", "weight_decay", "batch_size", "max_duration", "score")
_SHORT = {"matthews_correlation": "MCC", "accuracy": "acc", "f1": "F1", "pearson": "Pearson", "spearmanr": "Spearman"}


def terminal_table(summary: Summary) -> "Table":
    """One row a task and one of the average, in percent."""
    from rich.table import Table

    table = Table(title=f"{summary.name}: validation sets, {_selection(summary)}", title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in ("task", "metrics") else "right", overflow="fold")
    for task in summary.tasks:
        table.add_row(*_cells(task))
    if summary.average is not None:
        table.add_section()
        table.add_row("average", _percent(summary.average), "", "", "", _percent(summary.baseline), _over(summary))
    if summary.average_with_wnli is not None:
        table.add_row("with WNLI", _percent(summary.average_with_wnli), "", "", "", "", "")
    return table


def remarks(summary: Summary) -> list[str]:
    """What has to be known beside the figures, a line each: what is left out, in part, chosen, failed or pending."""
    lines = [f"not in the average: {_why_absent(summary)}"] if summary.absent else []
    for task in summary.tasks:
        if task.partial:
            lines.append(f"{task.task}: only part of the data was there ({', '.join(task.partial)})")
        if missing := [name for name in task.missing if name in TASKS[task.task].validation]:
            lines.append(f"{task.task}: not scored on {', '.join(missing)}, which was not there")
        if cut := {n for r in task.results if (n := r.spec["trainer_kwargs"].get("eval_subset_num_batches", -1)) > 0}:
            lines.append(f"{task.task}: scored on the first {max(cut)} batches of its validation set alone")
        if task.n < task.planned:
            lines.append(f"{task.task}: {task.n} of {task.planned} seeds")
        if task.points > 1:
            lines.append(
                f"{task.task}: {_point(task.point)}, chosen among {task.points} points on the validation set that "
                "gives its score, which is optimistic therefore"
            )
    lines += [f"failed: {failure.job_id}: {failure.reason} (log: {failure.log})" for failure in summary.failures]
    if summary.pending:
        lines.append(f"still to run: {len(summary.pending)} jobs")
    return [*lines, *summary.notes]


def write_report(summary: Summary, store: Store) -> list[Path]:
    """Write the report, and the submission where there are predictions, into the run's folder; return the files."""
    texts = {
        "report.md": markdown(summary),
        "report.json": json.dumps(_plain(summary), indent=2) + "\n",
        "report.csv": _csv_text(summary),
    }
    for name, text in texts.items():
        write_text_atomic(store.folder / name, text)
    submission = write_submission(summary, store)
    return [*(store.folder / name for name in texts), *([submission] if submission else [])]


def write_submission(summary: Summary, store: Store) -> Path | None:
    """Write the best seed's test-set predictions of each task as GLUE's server takes them; None without any.

    The seed is chosen on the validation set.
    """
    files: dict[str, Path] = {}
    for task in summary.tasks:
        best = max(task.results, key=lambda result: result.score)
        folder = store.job_folder(best.job_id)
        files |= {name: folder / place for name, place in best.predictions.items()}
    if not files:
        return None
    path = store.folder / SUBMISSION_NAME
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, file in sorted(files.items()):
                archive.write(file, name)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def missing_from_submission(summary: Summary) -> list[str]:
    """Names of the files that GLUE's server wants and no finished job has predicted."""
    wanted = [test.submission for name in GLUE_TASKS for test in TASKS[name].tests]
    there = {name for task in summary.tasks for result in task.results for name in result.predictions}
    return [name for name in wanted if name not in there]


def markdown(summary: Summary) -> str:
    """The whole report: our scores, the published ones beside them, and under what protocol each came about."""
    parts = [
        f"# {summary.name}",
        f"Validation sets, in percent; {_selection(summary)}; mean, sample standard deviation and number of finetuning "
        "seeds. `majority` always answers with the commonest label of the training set.",
        _markdown_table([COLUMNS, *(_cells(task) for task in summary.tasks)]),
        "\n".join(f"- {line}" for line in [*_averages(summary), *remarks(summary)]),
        "## How",
        _markdown_table(_how(summary)),
    ]
    if any(task.task in GLUE_TASKS for task in summary.tasks):
        parts += [
            "## Beside published scores",
            "Not one protocol: see below. `-` was not published or not run.",
            _markdown_table(_comparison(summary)),
            "\n".join(f"- **{name}**: {protocol}" for name, protocol in _protocols(summary)),
        ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _averages(summary: Summary) -> list[str]:
    if summary.average is None:
        return ["average: no task has finished"]
    lines = [f"average over {_over(summary)}: **{_percent(summary.average)}** (majority {_percent(summary.baseline)})"]
    if summary.average_with_wnli is not None:
        lines.append(f"with WNLI: **{_percent(summary.average_with_wnli)}**")
    return lines


def _comparison(summary: Summary) -> list[tuple[str, ...]]:
    names = [name for name in GLUE_TASKS if name != WNLI]
    ours = {task.task: task for task in summary.tasks}
    header = ("model", "size", *names, "average", "same tasks")
    cells = [f"{_percent(ours[name].score)}{_spread(ours[name])}" if name in ours else "-" for name in names]
    majority = [_percent(ours[name].baseline) if name in ours else "-" for name in names]
    common = [name for name in names if name in ours]
    average = _percent(summary.average) if common else "-"
    rows = [
        header,
        (f"**{summary.name}**", _size(summary), *cells, average if len(common) == len(names) else "-", average),
    ]
    rows.append(("always the commonest label", "", *majority, "-", _percent(summary.baseline) if common else "-"))
    return [*rows, *(_published_row(row, names, common) for row in PUBLISHED)]


def _size(summary: Summary) -> str:
    counts = [r.parameters for task in summary.tasks for r in task.results if r.parameters is not None]
    return f"{max(counts) / 1e6:.0f}M" if counts else ""


def _published_row(row: Published, names: Sequence[str], common: Sequence[str]) -> tuple[str, ...]:
    cells = [f"{row.scores[name]:.1f}" if name in row.scores else "-" for name in names]
    shared = [row.scores[name] for name in common if name in row.scores]
    same = f"{sum(shared) / len(shared):.1f}" if common and len(shared) == len(common) else "-"
    return (row.model, row.parameters, *cells, f"{row.average:.1f}", same)


def _protocols(summary: Summary) -> Iterable[tuple[str, str]]:
    scored = "accuracy and F1 averaged for MRPC and QQP, Pearson and Spearman for STS-B, both validation sets for MNLI"
    yield summary.name, f"validation sets, {_selection(summary)}; {scored}; trained as under How"
    yield from ((row.model, row.protocol) for row in PUBLISHED)


def _how(summary: Summary) -> list[tuple[str, ...]]:
    """What each task was trained with, as its first job has it; seeds apart, all have the same."""
    keys = ("lr", "weight_decay", "batch_size", "max_duration", "max_sequence_length", "precision", "pooling")
    rows = [("task", "starts from", "seeds", *(key.replace("_", " ") for key in keys))]
    for task in summary.tasks:
        spec = task.results[0].spec
        seeds = ", ".join(str(result.seed) for result in task.results)
        values = (f"{spec[key]:g}" if isinstance(spec[key], float) else str(spec[key]) for key in keys)
        rows.append((task.task, ", ".join(task.starts), seeds, *values))
    return rows


def _cells(task: TaskSummary) -> tuple[str, ...]:
    metrics = ", ".join(
        f"{_metric_name(key, task.task)} {_percent(value)}"
        for key, value in task.metrics.items()
        if key.partition("/")[2] in TASKS[task.task].metrics
    )
    std = "" if task.std is None else _percent(task.std)
    best = f"{task.best_seed} ({_percent(task.best_score)})"
    marked = f"{task.task} (part of the data)" if task.partial else task.task
    return (marked, _percent(task.score), std, str(task.n), best, _percent(task.baseline), metrics)


def _metric_name(key: str, task: str) -> str:
    evaluated, _, metric = key.partition("/")
    short = _SHORT.get(metric, metric)
    return short if evaluated == task else f"{evaluated} {short}"


def _spread(task: TaskSummary) -> str:
    return "" if task.std is None else f" ± {_percent(task.std)}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"


def _over(summary: Summary) -> str:
    glue = all(name in GLUE_TASKS for name in summary.averaged)
    of = f" of {len(GLUE_TASKS) - 1}" if glue else ""
    return f"{len(summary.averaged)}{of} tasks ({', '.join(summary.averaged)})"


def _why_absent(summary: Summary) -> str:
    """The absent tasks by reason, in words."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in summary.absent.items():
        by_reason.setdefault(reason, []).append(name)
    return "; ".join(f"{', '.join(names)} ({reason})" for reason, names in by_reason.items())


def _selection(summary: Summary) -> str:
    what = {"best": "best evaluation of each job", "last": "last evaluation of each job"}
    return what[summary.select]


def _point(point: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in point.items())


def _markdown_table(rows: Sequence[Sequence[str]]) -> str:
    lines = [rows[0], ["---", *("---:" for _ in rows[0][1:])], *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _csv_text(summary: Summary) -> str:
    """One line a finished job, those of a grid's other points included."""
    reported = [result for task in summary.tasks for result in task.results]
    jobs = [(result, True) for result in reported] + [(result, False) for result in summary.tried]
    metrics = list(dict.fromkeys(key for result, _ in jobs for key in result.metrics))
    tail = ("best_step", "last_step", "seconds", "peak_memory_bytes", "job_id")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*_CSV, *metrics, *tail])
    for result, is_reported in jobs:
        spec = [result.spec.get(key) for key in ("lr", "weight_decay", "batch_size", "max_duration")]
        row = [result.task, result.seed, "yes" if is_reported else "no", *spec, result.score]
        row += [result.metrics.get(key, "") for key in metrics]
        steps = [result.best.get("step"), result.last.get("step")]
        writer.writerow([*row, *steps, result.seconds, result.peak_memory_bytes, result.job_id])
    return text.getvalue()


def _plain(summary: Summary) -> dict[str, Any]:
    """The summary as JSON's values; of each job what the figures came from, not its curves."""
    values = asdict(summary)
    for task, plain in zip(summary.tasks, values["tasks"]):
        plain["results"] = [_job(result) for result in task.results]
    values["tried"] = [_job(result) for result in summary.tried]
    values["missing_from_submission"] = missing_from_submission(summary)
    values["published"] = [asdict(row) for row in PUBLISHED]
    return values


def _job(result: JobResult) -> dict[str, Any]:
    curves = ("train_losses", "evaluations")
    return {f.name: getattr(result, f.name) for f in fields(result) if f.name not in curves}
