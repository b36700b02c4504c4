"""Quasiseparable mixing in fast PyTorch: both directions in one pass, a dense product inside chunks and a scan of
chunk states between them. Linear in length; a short sequence is a single chunk, so one dense product.

Decays are computed in float32 or wider, whatever the inputs are.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from anymixer_kernels.quasiseparable.dense_product import DenseProduct
from anymixer_kernels.quasiseparable.reference import QuasiseparableInputs, initial_state_terms

# Up to DENSE_LENGTH one chunk covers the sequence, which is cheaper than carrying states; beyond it CHUNK tokens
# are the cheapest split (benchmarks/mixers.py). Neither changes the result.
DENSE_LENGTH = {"cpu": 128, "cuda": 256}
CHUNK = {"cpu": 64, "cuda": 128}


def quasiseparable_torch(inputs: QuasiseparableInputs, chunk_size: int = 256) -> Tensor:
    """Y = M X as [batch, length, nheads, headdim], by chunks of at most `chunk_size` tokens."""
    x, B, C, sequence_id = inputs.x, inputs.B, inputs.C, inputs.sequence_id
    length, device = x.shape[1], x.device.type
    one_chunk = length <= DENSE_LENGTH.get(device, 256)
    chunk_size = length if one_chunk else min(chunk_size, CHUNK.get(device, 128))
    wide = torch.promote_types(torch.promote_types(inputs.dt[0].dtype, inputs.A.dtype), torch.float32)
    dt, A = (inputs.dt[0].to(wide), inputs.dt[1].to(wide)), inputs.A.to(wide)

    # With shift, row t reads at its neighbour: C[t-1] from the left, C[t+1] from the right.
    at_neighbour = (pad(C[0][:, :-1], (0, 0, 0, 0, 1, 0)), pad(C[1][:, 1:], (0, 0, 0, 0, 0, 1)))
    read_at = at_neighbour if inputs.shift else C
    extra = -length % chunk_size
    xs = _chunks(x, extra, chunk_size).transpose(2, 3)
    ids = None if sequence_id is None else _chunks(sequence_id, extra, chunk_size, value=-1)
    Bs, Cs = (
        torch.stack([_chunks(t, extra, chunk_size).transpose(2, 3).to(x.dtype) for t in pair]) for pair in (B, read_at)
    )
    row, col, total = _log_weights(torch.stack([_chunks(t, extra, chunk_size) for t in dt]), A, inputs.shift)

    flat_ids = None if ids is None else ids.flatten(0, 1)
    inside = DenseProduct.apply(
        xs.flatten(0, 1), row.flatten(1, 2), col.flatten(1, 2), Bs.flatten(1, 2), Cs.flatten(1, 2), flat_ids
    )
    mixed = inside.unflatten(0, xs.shape[:2])  # type: ignore[attr-defined]
    if mixed.shape[1] > 1:
        across = [_across_chunks(xs, row[d], col[d], total[d], Bs[d], Cs[d], ids, bool(d)) for d in (0, 1)]
        mixed = mixed + (across[0] + across[1]).to(mixed.dtype)
    mixed = mixed.transpose(2, 3).flatten(1, 2)[:, :length]
    diagonal = inputs.diagonal if inputs.shift else _own_diagonal(inputs)
    if diagonal is not None:
        mixed = mixed + diagonal[..., None].to(x.dtype) * x
    if inputs.initial_state is not None:
        mixed = mixed + initial_state_terms(inputs)
    return mixed.to(x.dtype)


def _chunks(tensor: Tensor, extra: int, chunk_size: int, value: int = 0) -> Tensor:
    """[batch, length, ...] -> [batch, chunks, chunk_size, ...], `extra` positions of `value` at the end."""
    padding = (0, 0) * (tensor.dim() - 2) + (0, extra)
    return pad(tensor, padding, value=value).unflatten(1, (-1, chunk_size))


def _own_diagonal(inputs: QuasiseparableInputs) -> Tensor:
    """The diagonal without shift, where each direction feeds a token by itself: [batch, length, nheads]."""
    nheads = inputs.x.shape[2]
    similar = [(C * B).sum(-1).repeat_interleave(nheads // B.shape[2], dim=2) for B, C in zip(inputs.B, inputs.C)]
    own = similar[0] * inputs.dt[0] + similar[1] * inputs.dt[1]
    return own if inputs.diagonal is None else own + inputs.diagonal


def _log_weights(dt: Tensor, A: Tensor, shift: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Logarithms, relative to the chunk, of what readers and sources contribute, and of a whole chunk's decay.

    dt: [2, batch, chunks, chunk_size, nheads]. Returns row, col: [2, batch, chunks, nheads, chunk_size] with
    weight of source s at reader t = exp(row[t] + col[s]), and total: [2, batch, chunks, nheads].
    """
    dt = dt.transpose(-1, -2)
    step = A[:, None] * dt
    running = (torch.cumsum(step[0], -1), torch.cumsum(step[1].flip(-1), -1).flip(-1))
    row = torch.stack(running)
    if shift:
        row = torch.stack([pad(running[0][..., :-1], (1, 0)), pad(running[1][..., 1:], (0, 1))])
    # A step size that underflowed to 0 must not become log 0; e^-80 of an input is as good as nothing.
    col = torch.log(dt.clamp(min=1e-35)) - torch.stack(running)
    return row, col, torch.stack([running[0][..., -1], running[1][..., 0]])


def _across_chunks(
    x: Tensor,
    row: Tensor,
    col: Tensor,
    total: Tensor,
    B: Tensor,
    C: Tensor,
    ids: Tensor | None,
    from_right: bool,
) -> Tensor:
    """What one direction brings in from other chunks: [batch, chunks, nheads, chunk_size, headdim].

    Mamba-2's chunked scan (arXiv 2405.21060, section 6). The state that leaves a chunk belongs to the sequence of
    its last token on the way out; it is carried on, and read, only where that sequence goes on.
    x: [batch, chunks, nheads, chunk_size, headdim]; row, col, total as `_log_weights` makes them, one
    direction; B, C: [batch, chunks, ngroups, chunk_size, d_state].
    """
    nheads, ngroups = row.shape[2], B.shape[2]
    gain, keep, read = torch.exp(total[..., None] + col), torch.exp(total), torch.exp(row)
    if ids is not None:
        leaving = ids[:, :, 0] if from_right else ids[:, :, -1]
        arriving = pad(leaving[:, 1:], (0, 1), value=-1) if from_right else pad(leaving[:, :-1], (1, 0), value=-1)
        gain = gain * (ids == leaving[..., None])[:, :, None]
        keep = keep * (leaving == arriving)[..., None]
        read = read * (ids == arriving[..., None])[:, :, None]
    weighted = (gain[..., None] * x).unflatten(2, (ngroups, nheads // ngroups))
    gained = torch.einsum("bcgsn,bcghsp->bcghpn", B.to(weighted.dtype), weighted).flatten(2, 3)
    states = _carry_states(gained, keep, from_right).unflatten(2, (ngroups, nheads // ngroups))
    across = torch.einsum("bcgtn,bcghpn->bcghtp", C.to(states.dtype), states).flatten(2, 3)
    return read[..., None] * across


def _carry_states(gained: Tensor, keep: Tensor, from_right: bool) -> Tensor:
    """The state each chunk starts from: [batch, chunks, nheads, headdim, d_state].

    gained: what each chunk adds, same shape; keep: [batch, chunks, nheads], what a chunk keeps of its start.
    """
    chunks = range(gained.shape[1])
    state = torch.zeros_like(gained[:, 0])
    starts = []
    for chunk in reversed(chunks) if from_right else chunks:
        starts.append(state)
        state = keep[:, chunk, :, None, None] * state + gained[:, chunk]
    return torch.stack(starts[::-1] if from_right else starts, dim=1)
