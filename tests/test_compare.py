"""`anymixer compare`: what it refuses, what it writes, and runs that fail, are finished or have changed."""

import csv
import json
import math
from pathlib import Path

import pytest

from anymixer.pretrain import config_digest
from anymixer.report.comparison import (
    Result,
    best_first,
    draw_losses,
    results_table,
    running_mean,
    short_names,
    write_results,
)

ROOT = Path(__file__).parents[1]
BROKEN = """
from anymixer.mixers import SequenceMixer, register_mixer
@register_mixer("broken")
class Broken(SequenceMixer):
    def __init__(self, d_model, *, layer_idx=None):
        super().__init__()
    def forward(self, hidden_states, packing=None):
        raise RuntimeError("this mixer is broken")
"""


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch, child_environment, forget_own_mixers):
    monkeypatch.chdir(ROOT)


def result(name, loss, **changes):
    curve = [{"step": 0, "stream": "eval", "eval_loss": 9.0, "eval_accuracy": 0.0}]
    curve += [
        {"step": s, "tokens": 10 * s, "loss": 9.0 - s, "seconds": 1.0, "memory_bytes": 2**30} for s in range(1, 4)
    ]
    curve += [{"step": 3, "stream": "eval", "eval_loss": loss, "eval_accuracy": 0.5}]
    figures = {"folder": f"runs/{name}", "accuracy": 0.5, "train_loss": 6.0, "parameters": 1234, "steps": 3}
    figures |= {"tokens": 30, "tokens_per_second": 10.0, "peak_memory_bytes": 3 * 2**29, "curve": tuple(curve)}
    return Result(name=name, loss=loss, **(figures | changes))


def test_the_best_comes_first_and_a_diverged_run_last():
    names = [r.name for r in best_first([result("nan", math.nan), result("b", 2.0), result("a", 1.0)])]
    assert names == ["a", "b", "nan"]


def test_names_are_shown_without_what_they_share():
    assert short_names([result("demo-mixers-hydra", 1.0), result("demo-mixers-hymn", 1.0)]) == ["hydra", "hymn"]
    assert short_names([result("demo-a", 1.0), result("demo-", 1.0)]) == ["a", "demo-"]
    assert short_names([result("demo-a", 1.0)]) == ["demo-a"]
    assert short_names([result("ab", 1.0), result("ac", 1.0)]) == ["ab", "ac"]


def test_what_is_written_holds_the_same_figures(tmp_path):
    results = [result("second", 5.5), result("first", 5.25, tokens_per_second=None, peak_memory_bytes=None)]
    paths = write_results(results, tmp_path)
    assert [path.name for path in paths] == ["results.json", "results.csv", "results.md", "loss.png"]
    first, second = json.loads((tmp_path / "results.json").read_text())
    assert (first["name"], first["loss"], second["tokens_per_second"]) == ("first", 5.25, 10.0)
    rows = list(csv.DictReader((tmp_path / "results.csv").read_text().splitlines()))
    assert [row["name"] for row in rows] == ["first", "second"] and rows[1]["parameters"] == "1234"
    assert "| second | 5.500 | 50.0% | 1,234 | 10 | 1.50 GiB |" in (tmp_path / "results.md").read_text()
    assert results_table(results).row_count == 2


def test_of_language_models_perplexity_is_shown(tmp_path):
    lms = [result("a", 2.0, causal=True), result("b", math.nan, causal=True), result("c", 1e4, causal=True)]
    write_results(lms, tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert "| loss | perplexity | accuracy |" in text and "| 2.000 | 7.4 | 50.0% |" in text and "| inf |" in text
    assert draw_losses(lms).axes[0].get_ylabel() == "next-token loss (nats)"
    mixed = [lms[0], result("d", 1.0)]
    write_results(mixed, tmp_path)
    assert "perplexity" not in (tmp_path / "results.md").read_text()
    assert draw_losses(mixed).axes[0].get_ylabel() == "masked-LM or next-token loss (nats)"


def test_the_plot_has_every_step_and_evaluation():
    figure = draw_losses([result("one", 5.0)])
    line, dots = figure.axes[0].get_lines()
    assert list(line.get_xdata()) == [10, 20, 30] and line.get_ydata()[0] == pytest.approx(8.0)
    assert list(dots.get_xdata()) == [0, 30] and list(dots.get_ydata()) == [9.0, 5.0]


def test_a_running_mean_keeps_a_constant_and_short_runs_and_smooths_long_ones():
    assert running_mean([3.0] * 500) == pytest.approx([3.0] * 500)
    assert running_mean([3.0, 1.0, 2.0]) == pytest.approx([3.0, 1.0, 2.0])
    noisy = running_mean([1.0, 3.0] * 500)
    assert noisy[-100:] == pytest.approx([2.0] * 100, abs=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{a}", "{b}", "run_name=same", "save_folder={folder}/x"], "save_folder: another of the files has"),
        (["{a}", "{b}", "run_name=same"], "run_name: another of the files has 'same' too"),
        (["{a}", "save_folder=null", "autoresume=false"], "save_folder: not set to a local folder"),
        (["{a}", "autoresume=false"], "autoresume: false"),
        (["{a}", "optimzer.lr=1"], "did you mean 'optimizer'?"),
        (["{a}", "{folder}/none.yaml"], "no such file"),
        (["max_duration=3ba"], "files: none given"),
    ],
)
def test_mistakes_are_one_line_before_any_run(tmp_path, write_run, call_cli, capsys, arguments, message):
    files = {name: write_run(tmp_path, name) for name in ("a", "b")}
    assert call_cli("compare", *(a.format(folder=tmp_path, **files) for a in arguments)) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "a").exists()


def test_elsewhere_there_is_no_program_to_run(tmp_path, write_run, call_cli, capsys, monkeypatch):
    file = write_run(tmp_path, "a")
    monkeypatch.chdir(tmp_path)
    assert call_cli("compare", file) == 2
    assert "main.py: not in" in capsys.readouterr().err


def test_a_finished_run_is_one_of_this_configuration(tmp_path, write_run, call_cli, capsys):
    from anymixer.config import dump_config, load_config

    file = write_run(tmp_path, "a")
    assert call_cli("compare", file, "--dry-run") == 0
    assert "a: to train, 4ba, " in capsys.readouterr().out
    config = load_config(file)
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "summary.json").write_text(json.dumps({"config_sha256": config_digest(config)}))
    assert call_cli("compare", file, "progress_bar=true", "--dry-run") == 0
    assert "a: finished" in capsys.readouterr().out
    assert call_cli("compare", file, "optimizer.lr=0.5", "--dry-run") == 2
    assert "holds a run of another configuration (optimizer.lr: 0.01 -> 0.5)" in capsys.readouterr().err


def test_results_of_an_edited_mixer_are_not_taken_for_its_own(tmp_path, write_run):
    from anymixer.config import load_config

    own = tmp_path / "own.py"
    own.write_text(BROKEN)
    config = load_config(write_run(tmp_path, "a", mixer=f"{{name: broken, module: {own}}}"))
    before = config_digest(config)
    assert config_digest(config) == before
    own.write_text(BROKEN + "# edited\n")
    assert config_digest(config) != before


@pytest.mark.slow
def test_one_that_fails_does_not_end_the_others_and_finished_ones_are_kept(
    tmp_path, write_run, call_cli, capsys, monkeypatch
):
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "broken.py").write_text(BROKEN)
    files = [
        write_run(tmp_path, "bad", mixer=f"{{name: broken, module: {tmp_path}/broken.py}}"),
        write_run(tmp_path, "good", eval_interval="2ba"),
    ]
    out = tmp_path / "out"
    assert call_cli("compare", *files, "--output", out) == 2
    captured = capsys.readouterr()
    assert "[1/2] bad: failed after" in captured.out and "this mixer is broken" in captured.out
    assert "[2/2] good: held-out loss" in captured.out
    assert f"1 of 2 runs failed: bad (see {tmp_path}/bad/compare.log)" in captured.err
    (row,) = json.loads((out / "results.json").read_text())
    assert row["name"] == "good" and row["steps"] == 4 and row["tokens_per_second"] > 0
    assert (out / "loss.png").stat().st_size > 1000

    summary = (tmp_path / "good" / "summary.json").stat().st_mtime_ns
    assert call_cli("compare", files[1], "--output", out) == 0
    assert "[1/1] good: finished before" in capsys.readouterr().out
    assert (tmp_path / "good" / "summary.json").stat().st_mtime_ns == summary
