"""A kernel that does next to nothing, to find out whether Triton works on this machine."""

import torch
import triton
import triton.language as tl


@triton.jit
def _write_index(out, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(out + index, index)


def probe(device_type: str) -> None:
    """Run it. Raises what Triton raises, or RuntimeError for a wrong result."""
    out = torch.full((16,), -1, dtype=torch.int32, device=device_type)
    _write_index[(1,)](out, SIZE=16)
    if out.tolist() != list(range(16)):
        raise RuntimeError("a test kernel wrote wrong numbers")
