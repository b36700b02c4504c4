"""Time one decoding step of each causal mixer after contexts of different lengths, and count its state.

    python benchmarks/decode.py                                    # a laptop
    python benchmarks/decode.py --d-model 1024 --batch 32 --contexts 512 16384

The context is read in parallel (`prefill`), then steps are timed: their median, and the bytes that a row's state takes,
beside softmax attention's, whose cache grows.
"""

import argparse
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from timing import measure, print_header

from anymixer.mixers import build_mixer, mixers
from anymixer.mixers.base import as_causal, state_bytes

OPTIONS: dict[str, dict[str, Any]] = {"hgrn2": {"expand_ratio": 64}, "attention": {"positions": "rotary"}}
BASELINE = "attention"


def causal_specs() -> dict[str, dict[str, Any]]:
    """Name -> specification of every registered mixer that can be causal."""
    specs = {}
    for name in mixers.names():
        config = mixers.get(name).Config
        if config.ALWAYS_CAUSAL or "causal" in config.__dataclass_fields__:
            specs[name] = {"name": name, **OPTIONS.get(name, {})}
    return specs


@torch.no_grad()
def bench(spec: dict[str, Any], context: int, options: argparse.Namespace, device: torch.device) -> tuple[float, int]:
    """Milliseconds of a step after `context` tokens, and bytes of a row's state."""
    torch.manual_seed(0)
    mixer = build_mixer(as_causal(spec, options.d_model), options.d_model).to(device).eval()
    _, state = mixer.prefill(torch.randn(options.batch, context, options.d_model, device=device))
    token = torch.randn(options.batch, options.d_model, device=device)
    time = measure(lambda: mixer.step(token, state), device, repeat=options.repeat).milliseconds
    return time, state_bytes(state) // options.batch


def main() -> None:
    """Parse arguments, measure, print."""
    specs = causal_specs()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", nargs="+", default=list(specs), choices=list(specs))
    parser.add_argument("--contexts", nargs="+", type=int, default=[128, 2048, 65536])
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=50)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print_header(device, f"batch {options.batch}, d_model {options.d_model}, median of {options.repeat} steps")
    table = Table("mixer", "context", "ms a step", "x attention", "state kB a row")
    base = {context: bench(specs[BASELINE], context, options, device) for context in options.contexts}
    for name in [BASELINE, *(n for n in options.mixers if n != BASELINE)]:
        for context in options.contexts:
            time, size = base[context] if name == BASELINE else bench(specs[name], context, options, device)
            ratio = time / base[context][0]
            table.add_row(name, f"{context:,}", f"{time:.3f}", f"{ratio:.2f}", f"{size / 1000:,.1f}")
    Console(width=100).print(table)


if __name__ == "__main__":
    main()
