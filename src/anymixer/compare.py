"""Trains several YAML files one after the other and puts what they reached side by side.

    anymixer compare yamls/demo/mixers/*.yaml
    anymixer compare a.yaml b.yaml max_duration=20ba --output runs/short --dry-run

Each run is a process of main.py, so one that fails does not end the others. Started again, the same command
continues where it stopped: a run that has finished with the same configuration is not trained again.
"""

import contextlib
import dataclasses
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.status import Status

from anymixer.config import PretrainConfig, load_config
from anymixer.describe import build_on_meta, count_parameters
from anymixer.errors import UserError
from anymixer.pretrain import CONFIG_NAME, DISPLAY_KEYS, SUMMARY_NAME, check_run, config_digest, saved_config
from anymixer.report.comparison import Result, results_table, write_results
from anymixer.training import check_tables
from anymixer.training.run_metrics import METRICS_NAME, last_step, read_metrics

PROGRAM = Path("main.py")
# Seconds that a run is given to end when it is told to, and between two looks at its progress.
_GRACE, _POLL = 60.0, 0.5


@dataclass(frozen=True)
class Run:
    """One YAML file to train: its configuration, where it saves, and the arguments that main.py gets."""

    config: PretrainConfig
    folder: Path
    arguments: tuple[str, ...]

    @property
    def name(self) -> str:
        """The run's name, as tables and plots show it."""
        return str(self.config.run_name)


def compare(
    files: Sequence[str], overrides: Sequence[str], output: Path, *, ranks: int = 1, dry_run: bool = False
) -> None:
    """Train what is not trained yet, then print one table and write it, with a plot, into `output`.

    overrides: `key=value`, set on top of every file. ranks: processes that share each run's batch. dry_run: say
    what would be trained, and stop. Raises UserError for a mistake in any file before the first one trains,
    and after the table when runs have failed.
    """
    console = Console()
    runs = plan_runs(files, overrides)
    if dry_run:
        for run in runs:
            state = "finished" if is_finished(run) else "to train"
            parameters = count_parameters(build_on_meta(run.config))
            print(f"{run.name}: {state}, {run.config.max_duration}, {parameters:,} parameters, {run.folder}")
        return
    results = train_runs(runs, console, ranks=ranks)
    if results:
        console.print(results_table(results))
        for path in write_results(results, output):
            print(path)
    raise_for_failed(runs, results)


def train_runs(runs: Sequence[Run], console: Console, *, ranks: int = 1) -> list[Result]:
    """Train what is not trained yet, one run after the other, and return what those reached that finished."""
    with _ending_on_sigterm():
        places = [f"[{number}/{len(runs)}]" for number in range(1, len(runs) + 1)]
        finished = [run for run, place in zip(runs, places) if _train(run, place, ranks, console)]
    return [_result(run) for run in finished]


def raise_for_failed(runs: Sequence[Run], results: Sequence[Result]) -> None:
    """Raise UserError, naming their logs, where runs have no result."""
    finished = {result.name for result in results}
    failed = [run for run in runs if run.name not in finished]
    if failed:
        logs = ", ".join(str(_log(run)) for run in failed)
        raise UserError(f"{len(failed)} of {len(runs)} runs failed: {', '.join(r.name for r in failed)} (see {logs})")


def plan_runs(files: Sequence[str], overrides: Sequence[str]) -> list[Run]:
    """Load and check every file. Raises UserError for the first mistake in any of them."""
    if not PROGRAM.is_file():
        raise UserError(f"{PROGRAM}: not in {Path.cwd()}; start from the folder of the repository that holds it")
    if not files:
        raise UserError("files: none given; name the YAML files to compare")
    runs = []
    for file in files:
        config = load_config(file, overrides, checks=[check_tables])
        check_run(config)
        runs.append(Run(config, _save_folder(config, file), (file, *overrides, "progress_bar=false")))
    for what, values in (("save_folder", [run.folder for run in runs]), ("run_name", [run.name for run in runs])):
        for value, file in zip(values, files):
            if values.count(value) > 1:
                raise UserError(f"{file}: {what}: another of the files has '{value}' too; each needs its own")
    for run in runs:
        _refuse_another_run(run)
    return runs


def is_finished(run: Run) -> bool:
    """Whether the run's folder holds results of this very configuration."""
    return _digest_of_results(run) == config_digest(run.config)


def _digest_of_results(run: Run) -> str | None:
    summary = run.folder / SUMMARY_NAME
    return json.loads(summary.read_text(encoding="utf-8")).get("config_sha256") if summary.is_file() else None


def _save_folder(config: PretrainConfig, file: str) -> Path:
    from anymixer.training.launch import save_folder

    folder = save_folder(config)
    if folder is None or not config.autoresume:
        key = "save_folder: not set to a local folder" if folder is None else "autoresume: false"
        raise UserError(f"{file}: {key}; a comparison keeps its runs, to continue where it stopped")
    return folder


def _refuse_another_run(run: Run) -> None:
    """Raise UserError where main.py would continue a run of another configuration as if it were this one."""
    from anymixer.training.run_callbacks import changed_keys

    known = run.folder / CONFIG_NAME
    if not known.is_file() or is_finished(run):
        return
    before, now = (dataclasses.asdict(config) for config in (load_config(known), saved_config(run.config)))
    changed = changed_keys(before, now | {key: before[key] for key in DISPLAY_KEYS})
    if not changed and _digest_of_results(run) is not None:
        changed = ["the file of model.mixer.module has changed"]
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise UserError(
            f"{run.folder}: holds a run of another configuration ({changed[0]}{more}); "
            "move that folder away, or give this one a run_name of its own"
        )


def _train(run: Run, place: str, ranks: int, console: Console) -> bool:
    """Train one run to its end, with its output in a log; return whether it finished."""
    if is_finished(run):
        console.print(f"{place} {run.name}: finished before", markup=False)
        return True
    run.folder.mkdir(parents=True, exist_ok=True)
    launcher = [sys.executable] if ranks == 1 else [sys.executable, "-m", "composer", "-n", str(ranks)]
    started = time.monotonic()
    with open(_log(run), "a", encoding="utf-8") as log:
        process = subprocess.Popen([*launcher, str(PROGRAM), *run.arguments], stdout=log, stderr=subprocess.STDOUT)
        try:
            with console.status(f"{place} {run.name}: starting") as status:
                _wait(process, run, place, status)
        except (KeyboardInterrupt, SystemExit):
            _end(process)
            raise
    seconds = time.monotonic() - started
    if process.returncode:
        reason = _log(run).read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        console.print(f"{place} {run.name}: failed after {seconds:.0f} s: {' '.join(reason)}", markup=False)
        return False
    result = _result(run)
    perplexity = f", perplexity {result.perplexity:,.1f}" if result.causal else ""
    console.print(f"{place} {run.name}: held-out loss {result.loss:.3f}{perplexity}, {seconds:.0f} s", markup=False)
    return True


def _wait(process: subprocess.Popen, run: Run, place: str, status: Status) -> None:
    """Wait for the end of a run, and show the step it is at."""
    metrics = run.folder / METRICS_NAME
    while process.poll() is None:
        time.sleep(_POLL)
        if metrics.is_file() and (line := last_step(metrics)):
            loss = "" if line["loss"] is None else f", loss {line['loss']:.3f}"
            status.update(f"{place} {run.name}: step {line['step']:,}{loss}")


@contextlib.contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into SystemExit, so that the run that is training is told to end too."""
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(process: subprocess.Popen) -> None:
    process.terminate()
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _log(run: Run) -> Path:
    return run.folder / "compare.log"


def _result(run: Run) -> Result:
    summary = json.loads((run.folder / SUMMARY_NAME).read_text(encoding="utf-8"))
    return Result(
        name=run.name,
        folder=str(run.folder),
        loss=summary["after"]["loss"],
        accuracy=summary["after"]["accuracy"],
        train_loss=summary["train_loss"],
        parameters=summary["parameters"],
        steps=summary["steps"],
        tokens=summary["tokens"],
        tokens_per_second=summary["tokens_per_second"],
        peak_memory_bytes=summary["peak_memory_bytes"],
        causal=run.config.model.name == "causal_lm",
        curve=tuple(read_metrics(run.folder / METRICS_NAME)),
    )
