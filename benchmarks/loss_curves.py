"""Train one YAML file by two backends on the same data, and say how far apart their losses are, step by step.

    python benchmarks/loss_curves.py yamls/pretrain/hydra.yaml data_local=data/c4 max_duration=500ba \\
        model.model_config.num_hidden_layers=6 global_train_batch_size=256 --output runs/backends
    TRITON_INTERPRET=1 python benchmarks/loss_curves.py yamls/demo/hydra.yaml max_duration=5ba ...   # no GPU: slow

Two runs of main.py, which differ in `backend` alone: the same weights to begin with, the same batches, masks and
dropout. Rounding differs, and training amplifies it, so that single steps drift apart; means over many must not.
Started again with the same arguments, a finished run is not trained again.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from rich.console import Console
from timing import describe_machine, report

from anymixer.compare import plan_runs, raise_for_failed, train_runs
from anymixer.entry_point import run as run_program
from anymixer.errors import UserError
from anymixer.report.comparison import Result
from anymixer.report.figures import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Steps at the end whose mean loss is compared.
LAST = 50
COLUMNS = ("backends", "steps", "largest difference", "at step", "mean difference", "mean of the last steps", "apart")


def losses(result: Result) -> dict[int, float]:
    """Loss by step."""
    return {line["step"]: line["loss"] for line in result.curve if line.get("loss") is not None}


def compare_losses(first: Result, second: Result) -> list[str]:
    """The table's row."""
    a, b = losses(first), losses(second)
    if a.keys() != b.keys() or not a:
        raise UserError(f"{first.name}, {second.name}: not of the same steps ({len(a)} and {len(b)})")
    steps = sorted(a)
    apart = [abs(a[step] - b[step]) for step in steps]
    # NaN is the largest difference that there is.
    worst = max(range(len(steps)), key=lambda i: (apart[i] != apart[i], apart[i]))
    last = steps[-LAST:]
    ends = [sum(curve[step] for step in last) / len(last) for curve in (a, b)]
    return [
        f"{first.name}, {second.name}",
        str(len(steps)),
        f"{apart[worst]:.2e}",
        str(steps[worst]),
        f"{sum(apart) / len(apart):.2e}",
        f"{ends[0]:.4f}, {ends[1]:.4f} ({len(last)})",
        f"{abs(ends[0] - ends[1]):.2e}",
    ]


def draw(first: Result, second: Result) -> "Figure":
    """Both curves above, their difference below."""
    from matplotlib.figure import Figure

    a, b = losses(first), losses(second)
    figure = Figure(figsize=(9, 6), dpi=110, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[2, 1])
    for curve, name, style in ((a, first.name, "-"), (b, second.name, "--")):
        above.plot(list(curve), list(curve.values()), style, label=name, linewidth=1.2)
    below.plot(list(a), [abs(a[step] - b[step]) for step in a], linewidth=0.8)
    below.set_yscale("symlog", linthresh=1e-6)
    above.set_ylabel("training loss (nats)")
    below.set(xlabel="step", ylabel="difference")
    above.legend()
    for axes in (above, below):
        axes.grid(alpha=0.3, linewidth=0.5)
    return figure


def main(arguments: list[str]) -> None:
    """Parse arguments, train, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", metavar="FILE.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--backends", nargs=2, default=["triton", "torch"])
    parser.add_argument("--output", type=Path, default=Path("runs/backends"))
    options = parser.parse_intermixed_args(arguments)
    runs = []
    for backend in options.backends:
        own = [
            f"backend={backend}",
            f"run_name={backend}",
            f"save_folder={options.output}/{backend}",
            "autoresume=true",
        ]
        runs += plan_runs([options.file], [*options.overrides, *own])
    results = train_runs(runs, Console())
    raise_for_failed(runs, results)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report(COLUMNS, [compare_losses(*results)], [describe_machine(device)], options.output / "loss_curves.md")
    save_figure(draw(*results), options.output / "loss_curves.png")
    print(options.output / "loss_curves.png")


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
