"""The chunked scan of the mamba-ssm package (https://github.com/state-spaces/mamba; Mamba-2, arXiv 2405.21060), behind
one function. Its Triton kernels run on NVIDIA GPUs alone.

float32 inputs are multiplied in TF32, as Triton does unless TRITON_F32_DEFAULT=ieee is set.
"""

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib import metadata
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.torch_version import TorchVersion

from anymixer_kernels.sequences import starts

# mamba-ssm from the first version on needs Triton from the second on: 2.3.1 is the one for torch 2.7 (Triton 3.3).
NEEDS_TRITON = ("2.3.2", "3.5")
# Its kernels take tiles of at least 16 tokens; 256 is what Mamba-2 and Hydra were published with.
SMALLEST_CHUNK, LARGEST_CHUNK = 16, 256


def mamba_ssm_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    sequence_id: Tensor | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int = LARGEST_CHUNK,
) -> tuple[Tensor, Tensor]:
    """y_t = sum_{s <= t} (C_t . B_s) exp(A sum_{r=s+1}^{t} dt_r) dt_s x_s, within each sequence, and the last state.

    x: [batch, length, nheads, headdim], 0 at padding. dt: [batch, length, nheads]. A: [nheads]. B, C: [batch, length,
    ngroups, d_state]. sequence_id: [batch, length], -1 for padding. initial_state: [batch, nheads, headdim, d_state],
    not beside sequence_id. Returns y like x, and the state after each row's last token, [batch, nheads, headdim,
    d_state] in float32.
    """
    size = min(chunk_size, LARGEST_CHUNK, x.shape[1])
    chunk = max(SMALLEST_CHUNK, 1 << (size - 1).bit_length())
    return _scan(x, dt, A, B.to(x.dtype), C.to(x.dtype), chunk, _numbered(sequence_id), initial_state)


def _numbered(sequence_id: Tensor | None) -> Tensor | None:
    """Each run of equal ids by the place where it begins: padding is runs of its own, since mamba-ssm's kernels treat
    negative numbers in one direction only."""
    return None if sequence_id is None else starts(sequence_id).to(torch.int32).contiguous()


# Its autotuned kernels cannot be traced.
@torch.compiler.disable
def _scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk: int,
    sequence_index: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    options = {"seq_idx": sequence_index, "initial_states": initial_state, "return_final_states": True}
    return scan_function()(x, dt, A, B, C, chunk, **options)


@functools.cache
def scan_function() -> Callable[..., Any]:
    """mamba-ssm's `mamba_chunk_scan_combined`. Raises what importing it raises."""
    import_package()
    return importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined


def import_package() -> None:
    """Import mamba_ssm, also where it was built without its CUDA extension, which its package imports at once though
    this scan needs none of it. Raises ImportError."""
    try:
        importlib.import_module("mamba_ssm")
    except ImportError as error:
        if error.name != "selective_scan_cuda":
            raise
        package = ModuleType("mamba_ssm")
        package.__spec__ = importlib.util.find_spec("mamba_ssm")
        package.__path__ = package.__spec__.submodule_search_locations  # type: ignore[union-attr, assignment]
        sys.modules["mamba_ssm"] = package


@functools.cache
def import_problem() -> str | None:
    """Why the scan cannot be had on this machine, whatever the device; None where it can."""
    try:
        version, triton = metadata.version("mamba-ssm"), metadata.version("triton")
    except metadata.PackageNotFoundError as error:
        return f"{error.name} is not installed (docs/kernels.md says which version to take)"
    if TorchVersion(version) >= NEEDS_TRITON[0] and TorchVersion(triton) < NEEDS_TRITON[1]:
        return f"mamba-ssm {version} needs Triton {NEEDS_TRITON[1]} or newer and finds {triton}; take mamba-ssm 2.3.1"
    try:
        scan_function()
    except Exception as error:  # whatever its modules and their imports may raise: named in the message
        return f"mamba-ssm {version} cannot be imported ({type(error).__name__}: {error})"
    return None
