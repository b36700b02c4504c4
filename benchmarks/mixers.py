"""Time one block of each mixer, forward and backward, against the attention block in the same run.

    python benchmarks/mixers.py                                  # a laptop: small
    python benchmarks/mixers.py --d-model 768 --tokens 65536 --lengths 128 512 2048   # a GPU

Input float32 that needs a gradient, float32 parameters; bfloat16 autocast on a GPU. "x attention" is the
time over the attention block's at the same length; "of matmul" the share of the machine's measured matrix-product
rate that the block's own projections reach.
"""

import argparse
import contextlib
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from timing import Measurement, measure, print_header

from anymixer.mixers import build_mixer

BASELINE = "attention"
DD = {"qk_dim": 16, "headdim": 128}
DI = {"qk_dim": 16, "headdim": 128, "is_data_dependent": False}
# What is measured, by name in the table: every mixer with its defaults, and the matrix mixers as the paper's
# comparison has them, but with one head size and qk_dim throughout.
SPECS = {name: {"name": name} for name in ("attention", "hydra")} | {
    "dense": {"name": "dense", "headdim": 128},
    "dft": {"name": "vandermonde", "is_dft": True, "is_data_dependent": False, "headdim": 128},
    **{
        f"{name}-{kind}": {"name": name} | options
        for name in ("toeplitz", "vandermonde", "cauchy", "low_rank", "matrix_attention", "quasiseparable")
        for kind, options in (("dd", DD), ("di", DI))
    },
}


def spec_of(name: str, length: int) -> dict:
    """The specification of a table's row for rows of `length` tokens."""
    spec = SPECS[name]
    fixed = name == "dense" or name.endswith("-di")
    return spec | {"max_seq_len": length} if fixed else spec


def bench_block(name: str, length: int, options: argparse.Namespace, device: torch.device) -> dict[str, Measurement]:
    """Forward and forward+backward of one block over options.tokens tokens in rows of `length`."""
    torch.manual_seed(0)
    block = build_mixer(spec_of(name, length), options.d_model).to(device)
    hidden = torch.randn(max(1, options.tokens // length), length, options.d_model, device=device, requires_grad=True)
    cotangent = torch.randn_like(hidden)

    def forward() -> torch.Tensor:
        with _autocast(device):
            return block(hidden)

    def both() -> None:
        block.zero_grad(set_to_none=True)
        hidden.grad = None
        forward().float().backward(cotangent)

    with torch.no_grad():
        first = measure(forward, device, repeat=options.repeat)
    return {"forward": first, "both": measure(both, device, repeat=options.repeat)}


def _autocast(device: torch.device) -> contextlib.AbstractContextManager:
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


def projection_flops(name: str, length: int, options: argparse.Namespace) -> float:
    """Floating-point operations of the block's matrix products with parameters, forward and backward."""
    block = build_mixer(spec_of(name, length), options.d_model)
    weights = sum(m.weight.numel() for m in block.modules() if isinstance(m, torch.nn.Linear))
    return 6.0 * weights * options.tokens


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", nargs="+", default=list(SPECS), choices=list(SPECS))
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 512, 2048])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=10)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    what = f"{options.tokens:,} tokens, d_model {options.d_model}, median of {options.repeat}"
    found = print_header(device, what)
    table = Table("length", "mixer", "forward ms", "x attention", "forward+backward ms", "x attention")
    for column in ("peak GiB", "of matmul"):
        table.add_column(column)
    for length in options.lengths:
        run: Callable[[str], dict[str, Measurement]] = lambda name, n=length: bench_block(name, n, options, device)  # noqa: E731
        base = run(BASELINE)
        for name in [BASELINE, *(n for n in options.mixers if n != BASELINE)]:
            times = base if name == BASELINE else run(name)
            share = projection_flops(name, length, options) / times["both"].milliseconds / 1e9 / found["matmul_tflops"]
            table.add_row(
                str(length),
                name,
                *(
                    text
                    for part in ("forward", "both")
                    for text in (
                        f"{times[part].milliseconds:.2f}",
                        f"{times[part].milliseconds / base[part].milliseconds:.2f}",
                    )
                ),
                f"{times['both'].peak_gib:.2f}",
                f"{share:.0%}",
            )
    table.columns[1].no_wrap = True
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
