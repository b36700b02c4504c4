"""The report says what was reached, under what protocol, and what is missing; files hold the same figures."""

import csv
import dataclasses
import io
import json
import zipfile

import pytest
from rich.console import Console

from anymixer.files import write_text_atomic
from anymixer.glue.published import PUBLISHED
from anymixer.glue.report import markdown, missing_from_submission, remarks, terminal_table, write_report
from anymixer.glue.results import Failure, Store
from anymixer.glue.spec import JobSpec
from anymixer.glue.summary import Summary, TaskSummary
from anymixer.report.learning_curves import draw_learning_curves, write_learning_curves


@pytest.fixture
def summary(fake_job):
    """CoLA with two seeds, MNLI with one; RTE failed."""

    def task(name, seeds, **changes):
        results = [fake_job.result_of(JobSpec(task=name, seed=seed, model={})) for seed in seeds]
        best = max(results, key=lambda result: result.score)
        values = {
            "task": name,
            "score": sum(result.score for result in results) / len(results),
            "std": 0.01 if len(seeds) > 1 else None,
            "n": len(seeds),
            "planned": 2,
            "best_seed": best.seed,
            "best_score": best.score,
            "metrics": results[0].metrics | {f"{name}/loss": 0.3},
            "baseline": 0.25,
            "baseline_metrics": {},
            "point": {},
            "points": 1,
            "partial": [],
            "missing": [],
            "starts": ["runs/start"],
            "seconds": 1.0,
            "results": results,
        }
        return TaskSummary(**(values | changes))

    cola = task("cola", [0, 10])
    mnli = task("mnli", [0], partial=["train"], missing=["mnli-mm"], point={"lr": 1e-5}, points=3)
    failed = Failure(job_id="rte-1", task="rte", seed=1, attempts=2, reason="NaN", log="x/log.txt", log_end=[])
    return Summary(
        name="mine",
        select="last",
        tasks=[cola, mnli],
        tried=[fake_job.result_of(JobSpec(task="mnli", seed=0, model={}, lr=9e-5))],
        failures=[failed],
        pending=["qqp-1"],
        average=0.8675,
        average_with_wnli=0.7,
        baseline=0.25,
        averaged=["cola", "mnli"],
        absent={"rte": "NaN", "wnli": "not among the tasks"},
        notes=["a note"],
    )


def table_rows(text, title):
    lines = text.partition(title)[2].partition("\n## ")[0].splitlines()
    table = [line for line in lines if line.startswith("|")]
    return {cells[0]: cells for line in table if (cells := [cell.strip() for cell in line.strip("|").split("|")])}


def test_markdown_has_every_figure_and_every_protocol(summary):
    text = markdown(summary)
    rows = table_rows(text, "# mine")
    assert rows["cola"][1:6] == ["89.50", "1.00", "2", "0 (90.00)", "25.00"] and rows["cola"][6] == "MCC 90.00"
    assert rows["mnli (part of the data)"][1:4] == ["85.00", "", "1"]
    assert rows["mnli (part of the data)"][6] == "acc 85.00, mnli-mm acc 85.00"
    assert "**86.75** (majority 25.00)" in text and "with WNLI: **70.00**" in text
    assert "last evaluation of each job" in text
    how = table_rows(text, "## How")
    assert how["cola"][1:5] == ["runs/start", "0, 10", "3e-05", "3e-06"]
    for row in PUBLISHED:
        assert f"- **{row.model}**: {row.protocol}" in text


def test_published_rows_stand_beside_ours_over_the_same_tasks(summary):
    rows = table_rows(markdown(summary), "## Beside")
    header = rows["model"]
    ours, hydra = rows["**mine**"], rows["Hydra, 23 layers (paper, Table 4)"]
    assert ours[1] == "112M" and hydra[1] == "112M"
    assert ours[header.index("cola")] == "89.50 ± 1.00" and ours[header.index("rte")] == "-"
    assert (ours[-2], ours[-1]) == ("-", "86.75")
    assert hydra[header.index("mnli")] == "84.5" and hydra[-2] == "84.3"
    assert float(hydra[-1]) == pytest.approx((57.2 + 84.5) / 2, abs=0.05)
    assert rows["BERT-base (Devlin et al. 2018)"][-2:] == ["79.6", "-"]
    assert rows["always the commonest label"][-1] == "25.00"


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: row.model)
def test_published_averages_are_those_of_their_scores(row):
    assert row.protocol and (len(row.scores) == 8 or not row.scores)
    if row.scores:
        assert sum(row.scores.values()) / 8 == pytest.approx(row.average, abs=0.15)


def test_what_is_missing_is_said(summary):
    lines = "\n".join(remarks(summary))
    assert "not in the average: rte (NaN); wnli (not among the tasks)" in lines
    assert "mnli: only part of the data was there (train)" in lines
    assert "mnli: not scored on mnli-mm" in lines and "mnli: 1 of 2 seeds" in lines
    assert "mnli: lr 1e-05, chosen among 3 points" in lines and "optimistic" in lines
    assert "failed: rte-1: NaN (log: x/log.txt)" in lines and "still to run: 1 jobs" in lines and "a note" in lines


def test_files_hold_the_same_figures(summary, tmp_path):
    store = Store(tmp_path)
    for task in summary.tasks:
        for result in task.results:
            for place in result.predictions.values():
                write_text_atomic(store.job_folder(result.job_id) / place, f"index\tprediction\n0\t{result.seed}\n")
    paths = write_report(summary, store)
    assert [path.name for path in paths] == ["report.md", "report.json", "report.csv", "submission.zip"]
    assert paths[0].read_text() == markdown(summary)
    values = json.loads(paths[1].read_text())
    assert values["average"] == 0.8675 and values["tasks"][0]["results"][0]["spec"]["lr"] == 3e-5
    assert "train_losses" not in values["tasks"][0]["results"][0]
    rows = list(csv.DictReader(io.StringIO(paths[2].read_text())))
    assert [(row["task"], row["reported"]) for row in rows] == [("cola", "yes")] * 2 + [("mnli", "yes"), ("mnli", "no")]
    assert float(rows[0]["score"]) == pytest.approx(0.9) and rows[3]["lr"] == "9e-05"
    with zipfile.ZipFile(paths[3]) as archive:
        assert sorted(archive.namelist()) == ["AX.tsv", "CoLA.tsv", "MNLI-m.tsv", "MNLI-mm.tsv"]
        assert archive.read("CoLA.tsv").decode() == "index\tprediction\n0\t0\n"  # the best seed's
    assert "QNLI.tsv" in missing_from_submission(summary) and "AX.tsv" not in missing_from_submission(summary)


def test_the_terminal_shows_a_row_a_task_and_the_averages(summary):
    console = Console(width=150, record=True, file=io.StringIO())
    console.print(terminal_table(summary))
    text = console.export_text()
    assert "mine: validation sets, last evaluation of each job" in text
    assert "89.50" in text and "86.75" in text and "with WNLI" in text


def test_an_empty_report_can_be_written(summary, tmp_path):
    nothing = {"tasks": [], "tried": [], "average": None, "average_with_wnli": None, "baseline": None, "averaged": []}
    empty = dataclasses.replace(summary, **nothing)
    assert len(write_report(empty, Store(tmp_path))) == 3
    assert "no task has finished" in (tmp_path / "report.md").read_text()
    assert write_learning_curves(empty, tmp_path) is None


def test_curves_have_every_evaluation_and_mark_the_one_that_counts(summary, tmp_path):
    cola = draw_learning_curves(summary.tasks).axes[0]
    first, dot = cola.get_lines()[:2]
    assert list(first.get_xdata()) == [10, 20] and list(first.get_ydata()) == pytest.approx([91.0, 90.0])
    assert list(dot.get_xdata()) == [20]
    assert write_learning_curves(summary, tmp_path).stat().st_size > 1000
