"""Train the same models on 1, 2, 4, ... ranks: tokens/s, what is lost to communication, and whether the losses agree.

    python benchmarks/scaling.py yamls/pretrain/hydra.yaml yamls/pretrain/bert.yaml --data data/wiki --ranks 1 2 \\
        --batch 512 --steps 40 --out benchmarks/results/scaling.md
    python benchmarks/scaling.py yamls/demo/hydra.yaml --data data/demo --batch 16 --steps 12 --device cpu

Every row is one launch of main.py's program by Composer's launcher, `composer -n RANKS`. Strong scaling: `--batch` rows
are shared by the ranks; weak: each has as many. Tokens/s are the median step's, without warm-up and the profiled
steps; efficiency is per rank, against one rank without any parallelism. Communication is profiled on rank 0 in the last
steps: the share of time in which collectives run (waiting for slower ranks is in it), and the share in which nothing
else does. Dropout is off, because its masks depend on the rank: so the losses of strong scaling, whose global batches
are the same, should differ by rounding alone.
"""

import argparse
import contextlib
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from timing import describe_machine

from anymixer.config import load_config
from anymixer.files import write_text_atomic
from anymixer.training.run_metrics import METRICS_NAME, read_metrics, summarize

# Seconds that Composer's launcher gets to end its ranks, which takes it up to 30.
END_LIMIT = 35.0
RANK_PROGRAM = Path(__file__).with_name("scaling_rank.py")
COLUMNS = (
    "model",
    "ranks",
    "parallel",
    "scaling",
    "batch",
    "tokens/s",
    "efficiency",
    "communicating",
    "alone",
    "peak GiB",
    "last loss",
    "largest difference",
)


class LaunchFailed(Exception):
    """A launch that did not end well; the message has the end of its output."""


@dataclass(frozen=True)
class Case:
    """One launch. batch: rows of the global batch. scaling: "one rank", "strong" or "weak"."""

    file: str
    ranks: int
    parallel: str
    scaling: str
    batch: int

    @property
    def name(self) -> str:
        """A name for its folder and for messages."""
        words = (Path(self.file).stem, f"{self.ranks} ranks", self.parallel, self.scaling)
        return " ".join(words).replace("1 ranks none one rank", "1 rank")


@dataclass(frozen=True)
class Figures:
    """What a launch came to. losses: by step. exchanging, alone: as in scaling_rank.communication_shares."""

    tokens_per_second: float
    peak_bytes: int
    losses: dict[int, float]
    exchanging: float | None
    alone: float | None


def cases(options: argparse.Namespace) -> Iterator[Case]:
    """All launches; the models' single ranks first, against which the others are measured, then what is asked for
    first of all models, so that a benchmark that is cut short has that."""
    for file in options.files:
        yield Case(file, 1, "none", "one rank", options.batch)
    several = [ranks for ranks in options.ranks if ranks > 1]
    for parallel, scaling, ranks, file in product(options.parallel, options.scaling, several, options.files):
        yield Case(file, ranks, parallel, scaling, options.batch * (ranks if scaling == "weak" else 1))


def command(case: Case, folder: Path, options: argparse.Namespace) -> list[str]:
    """What starts it."""
    share = case.batch // case.ranks
    overrides = {
        "run_name": "scaling",
        "save_folder": folder,
        "data_local": options.data,
        "tokenizer_name": options.tokenizer or f"{options.data}/tokenizer",
        "global_train_batch_size": case.batch,
        "device_train_microbatch_size": math.ceil(share / options.microbatches),
        "max_duration": f"{options.steps}ba",
        "scheduler.t_warmup": f"{max(1, options.steps // 2)}ba",
        # By itself one rank would be launched in another way than several.
        "cuda_graphs": "false",
        "eval_interval": 0,
        "eval_first": "false",
        "eval_subset_num_batches": 1,
        "save_interval": "1000000ba",
        "autoresume": "false",
        "save_overwrite": "true",
        "progress_bar": "false",
        "device": options.device,
    }
    overrides |= dict.fromkeys(dropouts(case.file), 0.0)
    if case.parallel == "fsdp2":
        overrides["parallelism_config"] = "{fsdp: {}}"
    launcher = [sys.executable, "-m", "composer", "-n", str(case.ranks)]
    profiled = [str(folder / "communication.json"), str(options.profiled)]
    settings = [f"{key}={value}" for key, value in overrides.items()]
    return [*launcher, str(RANK_PROGRAM), *profiled, case.file, *settings, *options.set]


def dropouts(file: str) -> list[str]:
    """The keys of a model's dropout."""
    mixer = load_config(file).model.mixer
    mixers = mixer if isinstance(mixer, list) else [mixer]
    keys = [f"model.model_config.{name}_dropout_prob" for name in ("hidden", "layer")]
    if any(isinstance(one, dict) and "dropout" in one for one in mixers):
        keys.append("model.mixer.dropout")
    return keys


def measure(case: Case, work: Path, options: argparse.Namespace) -> Figures:
    """Launch it and read what it wrote. Raises LaunchFailed."""
    folder = work / case.name.replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    launch(command(case, folder, options), folder / "log.txt", options.time_limit)
    lines = [line for line in read_metrics(folder / METRICS_NAME) if "seconds" in line]
    summary = summarize(lines[: -options.profiled])
    profile = folder / "communication.json"
    shares = json.loads(profile.read_text()) if profile.exists() and case.ranks > 1 else {}
    return Figures(
        tokens_per_second=float(summary["tokens_per_second"] or math.nan),
        peak_bytes=int(summary["peak_memory_bytes"] or 0),
        losses={line["step"]: line["loss"] for line in lines},
        exchanging=shares.get("exchanging"),
        alone=shares.get("alone"),
    )


def launch(words: list[str], log: Path, time_limit: float) -> None:
    """Run a command to its end, and all that it started. Raises LaunchFailed for a time-out or an exit code."""
    # Without a port of their own the ranks would meet those of another launch; the launcher finds a free one.
    environment = {key: value for key, value in os.environ.items() if key != "MASTER_PORT"}
    with open(log, "w", encoding="utf-8") as output:
        launcher = subprocess.Popen(
            words, stdout=output, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        problem = f"exit code {launcher.wait(time_limit)}"
    except subprocess.TimeoutExpired:
        problem = f"not done after {time_limit:g} s"
        launcher.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            launcher.wait(END_LIMIT)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(launcher.pid, signal.SIGKILL)
        launcher.wait()
    if problem != "exit code 0":
        raise LaunchFailed(f"{problem}\n{log.read_text(encoding='utf-8')[-3000:]}")


def row(case: Case, found: Figures, one: Figures | None) -> list[str]:
    """A launch's cells; `one`: the same model on one rank, if that went well."""
    losses = one.losses if one else {}
    differences = [abs(loss - losses[step]) for step, loss in found.losses.items() if step in losses]
    return [
        Path(case.file).stem,
        str(case.ranks),
        {"ddp": "DDP", "fsdp2": "FSDP2"}.get(case.parallel, "-"),
        case.scaling if case.ranks > 1 else "-",
        f"{case.batch:,}",
        f"{found.tokens_per_second:,.0f}",
        f"{found.tokens_per_second / case.ranks / one.tokens_per_second:.3f}" if one else "-",
        _percent(found.exchanging),
        _percent(found.alone),
        f"{found.peak_bytes / 2**30:.1f}",
        f"{found.losses[max(found.losses)]:.4f}" if case.scaling != "weak" else "-",
        f"{max(differences):.4f}" if case.scaling == "strong" and differences else "-",
    ]


def markdown(rows: list[list[str]], options: argparse.Namespace) -> str:
    """The table, and what it depends on."""
    device = torch.device("cuda" if options.device == "gpu" else "cpu")
    head = [
        f"{describe_machine(device)}; {options.steps} steps, {options.microbatches} microbatch(es) a step,",
        f"`python {shlex.join(['benchmarks/scaling.py', *sys.argv[1:]])}`",
    ]
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    return "\n".join([*head, "", *(f"| {' | '.join(cells)} |" for cells in lines)]) + "\n"


def show(rows: list[list[str]], options: argparse.Namespace) -> None:
    """Print the table, and write it where it is to be kept."""
    table = Table(*COLUMNS)
    for cells in rows:
        table.add_row(*cells)
    Console(width=150).print(table)
    if options.out:
        write_text_atomic(options.out, markdown(rows, options))


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE.yaml")
    parser.add_argument("--data", required=True, help="a folder of shards; its tokenizer/ unless --tokenizer is given")
    parser.add_argument("--tokenizer")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--batch", type=int, default=512, help="rows: of all ranks (strong), of each (weak)")
    parser.add_argument("--microbatches", type=int, default=1, help="a step's; gradients are exchanged in the last")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--profiled", type=int, default=3, help="how many of the last steps are profiled")
    parser.add_argument("--parallel", nargs="+", choices=("ddp", "fsdp2"), default=["ddp", "fsdp2"])
    parser.add_argument("--scaling", nargs="+", choices=("strong", "weak"), default=["weak", "strong"])
    parser.add_argument("--device", choices=("gpu", "cpu"), default="gpu" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--set", nargs="*", default=[], metavar="key=value", help="more keys, for every launch")
    parser.add_argument("--out", help="where to write the table as Markdown")
    parser.add_argument("--work", help="folder of the launches, kept; by default a temporary one")
    parser.add_argument("--time-limit", type=float, default=300.0, help="seconds that one launch may take")
    return parser.parse_args()


def main() -> int:
    """Launch after launch; the table grows with each, and one that fails loses its own row. Returns how many did."""
    options = parse_arguments()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that no launch runs on
    rows: list[list[str]] = []
    ones: dict[str, Figures] = {}
    failed = 0
    try:
        with tempfile.TemporaryDirectory() as temporary:
            for case in cases(options):
                try:
                    found = measure(case, Path(options.work or temporary), options)
                except LaunchFailed as error:
                    print(f"{case.name}: {error}", flush=True)
                    failed += 1
                    continue
                if case.ranks == 1:
                    ones[case.file] = found
                rows.append(row(case, found, ones.get(case.file)))
                print(f"{case.name}: {found.tokens_per_second:,.0f} tokens/s", flush=True)
                if options.out:
                    write_text_atomic(options.out, markdown(rows, options))
    finally:
        show(rows, options)
    return failed


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


if __name__ == "__main__":
    sys.exit(min(main(), 1))
