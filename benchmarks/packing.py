"""Time one block over packed rows against the same number of tokens in rows of one sequence each.

    python benchmarks/packing.py                                                  # a laptop
    python benchmarks/packing.py --d-model 768 --tokens 65536                     # a GPU

Documents of random lengths, uniform around `--mean-length`, fill every row to its end, where the last one is cut; no
padding. Both batches hold the same numbers; the packed one says where sequences begin (`sequence_id`). "ratio" is the
packed batch's time over the other's: what it costs to keep neighbours apart.
"""

import argparse
import sys
from pathlib import Path

import torch
from timing import Measurement, autocast, free_memory, header_lines, measure, print_header, report
from torch import Tensor

from anymixer.entry_point import run as run_program
from anymixer.layers.packing import Packing
from anymixer.mixers import build_mixer

COLUMNS = (
    "mixer", "row length", "documents a row", "fixed forward ms", "packed", "ratio", "fixed forward+backward ms",
    "packed", "ratio",
)  # fmt: skip


def packed_rows(rows: int, length: int, mean_length: int, seed: int = 0) -> Tensor:
    """sequence_id [rows, length] of documents of 1 to 2 mean_length - 1 tokens, without padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.empty(rows, length, dtype=torch.int64)
    for row in ids:
        sizes = torch.randint(1, 2 * mean_length, (length,), generator=generator)
        row.copy_(torch.repeat_interleave(sizes)[:length])
    return ids


def bench(
    block: torch.nn.Module, hidden: Tensor, packing: Packing | None, repeat: int
) -> tuple[Measurement, Measurement]:
    """Forward alone, and forward and backward."""
    cotangent = torch.randn_like(hidden)

    def forward() -> Tensor:
        with autocast(hidden.device):
            return block(hidden, packing)

    def both() -> None:
        block.zero_grad(set_to_none=True)
        hidden.grad = None
        forward().float().backward(cotangent)

    with torch.no_grad():
        first = measure(forward, hidden.device, repeat=repeat)
    return first, measure(both, hidden.device, repeat=repeat)


def main(arguments: list[str]) -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", nargs="+", default=["hydra"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 512, 2048])
    parser.add_argument("--mean-length", type=int, default=64, help="tokens a document has")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--markdown", type=Path, metavar="FILE.md")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    what = f"{options.tokens:,} tokens, d_model {options.d_model}, median of {options.repeat}"
    found = print_header(device, what)
    rows = []
    for name in options.mixers:
        for length in options.lengths:
            torch.manual_seed(0)
            block = build_mixer(name, options.d_model).to(device)
            shape = (max(1, options.tokens // length), length)
            hidden = torch.randn(*shape, options.d_model, device=device, requires_grad=True)
            ids = packed_rows(*shape, options.mean_length)
            documents = float((ids[:, -1] + 1).float().mean())
            fixed = bench(block, hidden, None, options.repeat)
            packed = bench(block, hidden, Packing(ids.to(device), packed=True), options.repeat)
            cells = [name, f"{length:,}", f"{documents:.1f}"]
            for apart, together in zip(fixed, packed):
                ratio = together.milliseconds / apart.milliseconds
                cells += [f"{apart.milliseconds:.2f}", f"{together.milliseconds:.2f}", f"{ratio:.3f}"]
            rows.append(cells)
            free_memory()
    report(COLUMNS, rows, header_lines(device, what, found), options.markdown)


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
