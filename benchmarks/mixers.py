"""Time one block of each mixer, forward and backward, against the attention block in the same run.

    python benchmarks/mixers.py                                  # a laptop: small
    python benchmarks/mixers.py --d-model 768 --tokens 65536 --lengths 128 512 2048   # a GPU
    python benchmarks/mixers.py --d-model 768 --tokens 65536 --lengths 128 1024 8192 131072 \\
        --mixers attention hydra hydra-mamba_ssm --plot blocks.png --markdown blocks.md

Input float32 that needs a gradient, float32 parameters; bfloat16 autocast on a GPU. A row longer than the tokens is
read alone. "x attention" is the time over the attention block's at the same length. MFU is the share of the machine's
measured matrix-product rate that the block's projections reach; "least GB" what a block must move whose projections'
products, and whatever lies between them, are one pass each (the backward pass twice that), and "x floor" the time over
moving it at the rate of a copy. `*-mamba_ssm` run by the mamba-ssm package, where it is installed: hydra and ssd with
its scan (and our convolution, norm and gate), mamba2 as its own block.
"""

import argparse
import itertools
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from anymixer_kernels import backend, force_backend, mamba_ssm_scan
from timing import (
    Measurement,
    autocast,
    free_memory,
    header_lines,
    measure,
    print_header,
    report,
    told,
    write_markdown,
)
from torch import nn

from anymixer.entry_point import run as run_program
from anymixer.errors import UserError
from anymixer.mixers import build_mixer
from anymixer.report.figures import save_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BASELINE = "attention"
DD = {"qk_dim": 16, "headdim": 128}
DI = {"qk_dim": 16, "headdim": 128, "is_data_dependent": False}
# What is measured, by name in the table: every mixer with its defaults, and the matrix mixers as the paper's
# comparison has them, but with one head size and qk_dim throughout.
SPECS = {name: {"name": name} for name in ("attention", "hydra", "ssd")} | {
    "dense": {"name": "dense", "headdim": 128},
    "dft": {"name": "vandermonde", "is_dft": True, "is_data_dependent": False, "headdim": 128},
    **{
        f"{name}-{kind}": {"name": name} | options
        for name in ("toeplitz", "vandermonde", "cauchy", "low_rank", "matrix_attention", "quasiseparable")
        for kind, options in (("dd", DD), ("di", DI))
    },
}
MAMBA_SSM = "-mamba_ssm"
PEERS = tuple(f"{name}{MAMBA_SSM}" for name in ("hydra", "ssd", "mamba2"))
COLUMNS = (
    "mixer", "d_model", "length", "forward ms", "x attention", "forward+backward ms", "x attention", "peak GiB", "MFU",
    "least GB", "x floor",
)  # fmt: skip


@dataclass(frozen=True)
class Times:
    """Of one block: what `measure` found, the tokens it read, and what it must compute and move, both ways."""

    forward: Measurement
    both: Measurement
    tokens: int
    flops: float
    bytes: float

    def cells(self, base: "Times | None", found: dict[str, float]) -> list[str]:
        """The row's cells after the length; base: the attention block's times."""
        cells = []
        for part in ("forward", "both"):
            time = getattr(self, part).milliseconds
            cells += [f"{time:.2f}", f"{time / getattr(base, part).milliseconds:.2f}" if base else ""]
        rate = self.both.milliseconds * 1e6
        share = self.flops / rate / 1e3 / found["matmul_tflops"]
        floor = rate * found["copy_gbs"] / self.bytes
        return [*cells, f"{self.both.peak_gib:.2f}", f"{share:.0%}", f"{self.bytes / 1e9:.2f}", f"{floor:.1f}"]


# By mixer, d_model and length.
Found = dict[tuple[str, int, int], Times]


def build(name: str, length: int, d_model: int) -> nn.Module:
    """The block of a table's row, for rows of `length` tokens."""
    if name == f"mamba2{MAMBA_SSM}":
        mamba_ssm_scan.import_package()
        from mamba_ssm.modules.mamba2 import Mamba2  # type: ignore[import-not-found]

        # Its fused path needs causal-conv1d, which is another package.
        return Mamba2(d_model, use_mem_eff_path=False)
    spec = SPECS[name.removesuffix(MAMBA_SSM)]
    fixed = name == "dense" or name.endswith("-di")
    return build_mixer(spec | {"max_seq_len": length} if fixed else spec, d_model)


def bench_block(name: str, length: int, d_model: int, options: argparse.Namespace, device: torch.device) -> Times:
    """Forward and forward+backward of one block over options.tokens tokens in rows of `length`."""
    torch.manual_seed(0)
    block = build(name, length, d_model).to(device)
    hidden = torch.randn(max(1, options.tokens // length), length, d_model, device=device, requires_grad=True)
    cotangent = torch.randn_like(hidden)

    def forward() -> torch.Tensor:
        with autocast(device):
            return block(hidden)

    def both() -> None:
        block.zero_grad(set_to_none=True)
        hidden.grad = None
        forward().float().backward(cotangent)

    with force_backend("mamba_ssm" if name.endswith(MAMBA_SSM) else "auto"):
        with torch.no_grad():
            first = measure(forward, device, repeat=options.repeat)
        second = measure(both, device, repeat=options.repeat)
    tokens = hidden.shape[0] * length
    linears = [module for module in block.modules() if isinstance(module, nn.Linear)]
    widths = sum(linear.in_features + linear.out_features for linear in linears)
    # The projections' operands, and again what is not the block's own input or output.
    moved = 3 * (2 * widths - 2 * d_model) * (2 if device.type == "cuda" else 4)
    return Times(first, second, tokens, 6.0 * tokens * sum(linear.weight.numel() for linear in linears), moved * tokens)


def try_block(name: str, length: int, d_model: int, options: argparse.Namespace, device: torch.device) -> Times | None:
    """The same, or None where the device's memory does not hold it."""
    try:
        return bench_block(name, length, d_model, options, device)
    except torch.OutOfMemoryError:
        return None
    finally:
        free_memory()


def crossing(lengths: list[int], ours: list[float], theirs: list[float]) -> float | None:
    """The length from which ours takes less time than theirs, between those measured; None where it never does, the
    first of them where it always does."""
    ahead = [math.log(a / b) for a, b in zip(ours, theirs)]
    slower = [i for i, difference in enumerate(ahead) if difference > 0]
    if not slower:
        return lengths[0]
    if (last := slower[-1]) == len(lengths) - 1:
        return None
    share = ahead[last] / (ahead[last] - ahead[last + 1])
    return lengths[last] * (lengths[last + 1] / lengths[last]) ** share


def crossings(found: Found) -> list[str]:
    """From where on each other mixer is faster than attention, forward and backward, in a line each."""
    lines = []
    for name, d_model in dict.fromkeys((name, d_model) for name, d_model, _ in found if name != BASELINE):
        both = sorted(n for who, d, n in found if (who, d) == (name, d_model) and (BASELINE, d, n) in found)
        times = [[found[who, d_model, n].both.milliseconds for n in both] for who in (name, BASELINE)]
        if len(both) > 1:
            where = crossing(both, *times)
            told = "at no length measured" if where is None else f"from about {where:,.0f} tokens on"
            lines.append(f"{name} is faster than {BASELINE} {told} (d_model {d_model})")
    return lines


def draw(found: Found, tokens: int) -> "Figure":
    """Time forward and backward by length, both logarithmic; a panel for each d_model."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

    widths = sorted({d_model for _, d_model, _ in found})
    figure = Figure(figsize=(1 + 6 * len(widths), 5), dpi=110, layout="constrained")
    for axes, width in zip(figure.subplots(1, len(widths), squeeze=False)[0], widths):
        for name in dict.fromkeys(name for name, d_model, _ in found if d_model == width):
            points = sorted((n, t) for (who, d, n), t in found.items() if (who, d) == (name, width))
            scaled = [time.both.milliseconds * tokens / time.tokens for _, time in points]
            axes.loglog([length for length, _ in points], scaled, "o-", label=name, linewidth=1.3, markersize=4, base=2)
        axes.set_yscale("log", base=10)
        axes.xaxis.set(major_locator=FixedLocator(sorted({n for _, _, n in found})), major_formatter="{x:,.0f}")
        axes.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set(xlabel="tokens a row", ylabel=f"forward+backward, ms for {tokens:,} tokens", title=f"d_model {width}")
        axes.grid(alpha=0.3, linewidth=0.5, which="both")
        axes.legend(fontsize=8)
    return figure


def chosen(names: list[str] | None, device: torch.device) -> list[str]:
    """The mixers to measure, attention first. Raises UserError for one that was asked for and cannot run here."""
    problem = backend.mamba_ssm_problem(device.type)
    if names is not None and problem and (asked := [name for name in names if name in PEERS]):
        raise UserError(f"--mixers: {asked[0]}: {problem}")
    if names is None:
        names = [*SPECS, *(() if problem else PEERS)]
        if problem:
            print(f"without {', '.join(PEERS)}: {problem}")
    return [BASELINE, *(name for name in names if name != BASELINE)]


def bench_all(
    options: argparse.Namespace, names: list[str], device: torch.device, ceilings: dict[str, float], found: Found
) -> Iterator[list[str]]:
    """The table's rows, one after the other; what they tell goes into `found` too."""
    for d_model, length in itertools.product(options.d_model, options.lengths):
        for name in names:
            times = try_block(name, length, d_model, options, device)
            head = [name, str(d_model), f"{length:,}"]
            if times is None:
                yield [*head, "out of memory", *[""] * (len(COLUMNS) - 4)]
            else:
                found[name, d_model, length] = times
                yield [*head, *times.cells(found.get((BASELINE, d_model, length)), ceilings)]


def main(arguments: list[str]) -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", nargs="+", choices=[*SPECS, *PEERS], metavar="MIXER", help="all, unless named")
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 512, 2048])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--d-model", nargs="+", type=int, default=[256])
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    parser.add_argument("--markdown", type=Path, metavar="FILE.md")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = chosen(options.mixers, device)
    what = f"{options.tokens:,} tokens, median of {options.repeat}"
    ceilings = print_header(device, what)
    found: Found = {}
    lines = header_lines(device, what, ceilings)
    keep = partial(write_markdown, options.markdown, COLUMNS, lines)
    rows = list(told(bench_all(options, names, device, ceilings, found), keep))
    crossed = crossings(found)
    report(COLUMNS, rows, [*lines, *crossed], options.markdown)
    print("\n".join(crossed))
    if options.plot:
        save_figure(draw(found, options.tokens), options.plot)
        print(options.plot)


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
