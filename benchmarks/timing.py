"""Timing that the benchmarks share: medians, peak memory, and the ceilings of the machine in the same run."""

import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

# About 2 ms.
HEAD_START_CYCLES = 4_000_000


@dataclass(frozen=True)
class Measurement:
    """milliseconds: median of the repetitions. peak_gib: most device memory in use, 0 on a CPU."""

    milliseconds: float
    peak_gib: float


def measure(function: Callable[[], object], device: torch.device, *, warmup: int = 5, repeat: int = 20) -> Measurement:
    """Time `function` by device events on a GPU, by the wall clock on a CPU."""
    for _ in range(warmup):
        function()
    if device.type != "cuda":
        return Measurement(statistics.median(_wall(function) for _ in range(repeat)), 0.0)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(repeat):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # The device sleeps while the host runs ahead: what is timed is the device's work, unless launching all of it
        # takes the host longer than the work itself.
        torch.cuda._sleep(HEAD_START_CYCLES)
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return Measurement(statistics.median(times), torch.cuda.max_memory_allocated() / 2**30)


def _wall(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


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
    print(describe_machine(device))
    print(f"ceilings: matmul {found['matmul_tflops']:.3g} TFLOP/s, copy {found['copy_gbs']:.4g} GB/s")
    print(what)
    return found


def describe_machine(device: torch.device) -> str:
    """The hardware and versions a figure depends on, in one line."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{platform.processor() or 'CPU'}"
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    return f"{name}{threads}, torch {torch.__version__}, Python {platform.python_version()}"
