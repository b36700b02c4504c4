"""Time one decoding step of each causal mixer after contexts of different lengths, and count its state.

    python benchmarks/decode.py                                    # a laptop
    python benchmarks/decode.py --d-model 1024 --batch 32 --contexts 512 16384

The context, one for all rows, is read in parallel (`prefill`), then steps are timed, the contexts in turn, so that
what else the machine does falls on all of them; and the bytes that a row's state takes. Softmax attention, whose cache
grows, comes first.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from timing import free_memory, header_lines, measure, print_header, report, told

from anymixer.mixers import build_mixer, mixers
from anymixer.mixers.base import State, as_causal, state_bytes

OPTIONS: dict[str, dict[str, Any]] = {
    "attention": {"positions": "rotary"},
    "dma": {"keep_window_size": 1024},
    "hgrn2": {"expand_ratio": 64},
}
BASELINE = "attention"


def causal_specs() -> dict[str, dict[str, Any]]:
    """Name -> specification of every registered mixer that can be causal."""
    specs = {}
    for name in mixers.names():
        config = mixers.get(name).Config
        if config.ALWAYS_CAUSAL or "causal" in config.__dataclass_fields__:
            specs[name] = {"name": name, **OPTIONS.get(name, {})}
    return specs


def of_rows(state: State, rows: int) -> State:
    """The state of one row, for each of `rows` rows."""
    return {name: tensor.repeat_interleave(rows, dim=0) for name, tensor in state.items()}


@torch.no_grad()
def bench(spec: dict[str, Any], options: argparse.Namespace, device: torch.device) -> list[tuple[float, int]]:
    """Milliseconds of a step after each context, and bytes of a row's state."""
    torch.manual_seed(0)
    mixer = build_mixer(as_causal(spec, options.d_model), options.d_model).to(device).eval()
    token = torch.randn(options.batch, options.d_model, device=device)
    states, times = [], [math.inf] * len(options.contexts)
    for context in options.contexts:
        state = mixer.prefill(torch.randn(1, context, options.d_model, device=device))[1]
        states.append(of_rows(state, options.batch))
    for _ in range(options.rounds):
        for i, state in enumerate(states):
            time = measure(lambda state=state: mixer.step(token, state), device, repeat=options.repeat).milliseconds
            times[i] = min(times[i], time)
    return [(time, state_bytes(state) // options.batch) for time, state in zip(times, states)]


def main() -> None:
    """Parse arguments, measure, print."""
    specs = causal_specs()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", nargs="+", default=list(specs), choices=list(specs))
    parser.add_argument("--contexts", nargs="+", type=int, default=[128, 2048, 65536])
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--markdown", type=Path, metavar="FILE.md")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    how = f"quickest of {options.rounds} medians of {options.repeat} steps"
    what = f"batch {options.batch}, d_model {options.d_model}, {how}"
    found = print_header(device, what)
    columns = ["mixer", *(f"ms at {n:,}" for n in options.contexts), *(f"kB at {n:,}" for n in options.contexts)]

    def row(name: str) -> list[str]:
        free_memory()
        times, sizes = zip(*bench(specs[name], options, device))
        return [name, *(f"{time:.3f}" for time in times), *(f"{size / 1000:,.1f}" for size in sizes)]

    rows = list(told(map(row, [BASELINE, *(n for n in options.mixers if n != BASELINE)])))
    report(columns, rows, header_lines(device, what, found), options.markdown)


if __name__ == "__main__":
    main()
