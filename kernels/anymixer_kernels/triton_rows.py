"""How the Triton forms of norms lay out tensors: as rows, several of which make a tile."""

import triton
from torch import Tensor

from anymixer_kernels.triton_common import block_of

MAX_ROWS = 64
# A backward program goes through several tiles, which keeps the partial sums of the parameters' gradients small.
MAX_TILES = 64


def as_rows(tensor: Tensor) -> Tensor:
    """[rows, width], without a copy where the last axis has no gaps and the others flatten."""
    tensor = tensor if tensor.stride(-1) == 1 else tensor.contiguous()
    return tensor.reshape(-1, tensor.shape[-1])


def tile(width: int, entries: int, warp_entries: int) -> dict[str, int]:
    """Columns and rows of a tile of about `entries` numbers, and the warps that work on it, each on `warp_entries`."""
    block = block_of(width)
    rows = min(MAX_ROWS, max(1, entries // block))
    return {"ROWS": rows, "BLOCK": block, "num_warps": min(16, max(1, rows * block // warp_entries))}


def backward_programs(rows: int, shape: dict[str, int], programs: int) -> tuple[int, dict[str, int]]:
    """How many programs go through all rows in tiles of a `shape`, at least `programs` if there are tiles enough; and
    the shape with the number of tiles of each: a power of two, so that few kernels are compiled."""
    tiles, steps = triton.cdiv(rows, shape["ROWS"]), 1
    while steps < MAX_TILES and steps * 2 * programs <= tiles:
        steps *= 2
    return triton.cdiv(tiles, steps), {"TILES": steps, **shape}
