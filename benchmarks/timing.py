"""What benchmarks share: medians, peak memory, the ceilings of the machine in the same run, tables."""

import contextlib
import gc
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# About 2 ms.
HEAD_START_CYCLES = 4_000_000
# Of a kernel's name, whose template arguments have no end.
NAME_LENGTH = 80


@dataclass(frozen=True)
class Measurement:
    """milliseconds: median of the repetitions. peak_gib: most device memory in use, 0 on a CPU."""

    milliseconds: float
    peak_gib: float


def measure(
    function: Callable[[], object], device: torch.device, *, warmup: int = 5, repeat: int = 20, wall: bool = False
) -> Measurement:
    """Time `function` by device events on a GPU, by the wall clock on a CPU.

    wall: by the wall clock everywhere, to the end of the device's work: launching is part of what a whole step costs.
    """
    for _ in range(warmup):
        function()
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    timed = _by_events if cuda and not wall else _by_wall_clock
    milliseconds = statistics.median(timed(function) for _ in range(repeat))
    return Measurement(milliseconds, torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0)


def _by_events(function: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # The device sleeps while the host runs ahead: what is timed is the device's work, unless launching all of it
    # takes the host longer than the work itself.
    torch.cuda._sleep(HEAD_START_CYCLES)
    start.record(torch.cuda.current_stream())
    function()
    end.record(torch.cuda.current_stream())
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def _by_wall_clock(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - start)


def autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """bfloat16 on a GPU, float32 elsewhere."""
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


def free_memory() -> None:
    """Give back what the last measurement held, so that the next one's peak is its own."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def ceilings(device: torch.device) -> dict[str, float]:
    """TFLOP/s of a large square matrix product and GB/s of a large copy (bytes read and written)."""
    cuda = device.type == "cuda"
    size, dtype = (8192, torch.bfloat16) if cuda else (2048, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = measure(lambda: a @ b, device, repeat=10)
    source = torch.randn((2**30 if cuda else 2**26) // 4, device=device)
    target = torch.empty_like(source)
    copy = measure(lambda: target.copy_(source), device, repeat=10)
    return {
        "matmul_tflops": 2 * size**3 / product.milliseconds / 1e9,
        "copy_gbs": 2 * source.numel() * 4 / copy.milliseconds / 1e6,
    }


def print_header(device: torch.device, what: str) -> dict[str, float]:
    """Print machine, ceilings and `what` is timed; return the ceilings."""
    found = ceilings(device)
    print("\n".join(header_lines(device, what, found)))
    return found


def header_lines(device: torch.device, what: str, found: dict[str, float]) -> list[str]:
    """What a table's figures depend on; found: as `ceilings` returns it."""
    rates = f"ceilings: matmul {found['matmul_tflops']:.3g} TFLOP/s, copy {found['copy_gbs']:.4g} GB/s"
    return [describe_machine(device), rates, what]


def largest_costs(function: Callable[[], object], device: torch.device, number: int = 5) -> str:
    """One call's time on the device, and the kernels (on a CPU, operators) that take most of it, and how often."""
    cuda = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU], acc_events=True) as profiler:
        function()
        if cuda:
            torch.cuda.synchronize()
    if cuda:  # what launches kernels, and spans of them that a program has named, would count them again
        found = [e for e in profiler.key_averages() if e.device_type == DeviceType.CUDA and not e.is_user_annotation]
        costs = [(e.self_device_time_total, e) for e in found]
    else:
        costs = [(e.self_cpu_time_total, e) for e in profiler.key_averages()]
    costs.sort(key=lambda cost: -cost[0])
    named = [f"{e.key[:NAME_LENGTH]} {time / 1e3:.2f} ms ({e.count} times)" for time, e in costs[:number]]
    return f"{sum(time for time, _ in costs) / 1e3:.2f} ms of {'kernels' if cuda else 'operators'}: {', '.join(named)}"


def told(
    rows: Iterable[list[str]], keep: Callable[[Sequence[Sequence[str]]], object] | None = None
) -> Iterator[list[str]]:
    """Print each row when it comes, and give all so far to `keep`: a run that is cut short has said what it knows."""
    so_far = []
    for row in rows:
        print("  ".join(row), flush=True)
        so_far.append(row)
        if keep is not None:
            keep(so_far)
        yield row


def write_markdown(
    file: Path | None, columns: Sequence[str], lines: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    """Write a table below `lines` and this program's command, where a file is named."""
    from anymixer.files import write_text_atomic
    from anymixer.report.comparison import markdown_table

    if file is not None:
        command = shlex.join(["python", *sys.argv])
        head = "\n".join(f"{line}  " for line in (*lines, f"`{command}`"))
        write_text_atomic(file, f"{head}\n\n{markdown_table(columns, rows)}")


def report(
    columns: Sequence[str], rows: Sequence[Sequence[str]], lines: Sequence[str] = (), markdown: Path | None = None
) -> None:
    """Print a table, and `write_markdown` it.

    lines: `header_lines`, which have been printed, and whatever else is to stand there.
    """
    from rich.console import Console
    from rich.table import Table

    table = Table(*columns)
    for row in rows:
        table.add_row(*row)
    table.columns[0].no_wrap = True
    Console(width=140).print(table)
    write_markdown(markdown, columns, lines, rows)
    if markdown is not None:
        print(markdown)


def describe_machine(device: torch.device) -> str:
    """The hardware and versions a figure depends on, in one line."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.processor() or 'CPU'}"
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    return f"{name}{threads}, torch {torch.__version__}, Python {platform.python_version()}"
