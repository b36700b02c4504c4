"""Low-rank mixing in fast PyTorch: Q (K^T V), and by rows of several sequences blocks of Q K^T or a recurrence."""

import torch
from torch import Tensor

from anymixer_kernels.blockwise import mix_in_blocks
from anymixer_kernels.linear_recurrence.both_ways import mix_both_ways
from anymixer_kernels.linear_recurrence.torch_form import linear_recurrence_torch
from anymixer_kernels.low_rank.reference import low_rank_block

# Up to here blocks of M cost less than a recurrence from both ends, by its time on a CPU.
BLOCKS_LENGTH = 256
CHUNK = 64


def low_rank_torch(q: Tensor, k: Tensor, v: Tensor, sequence_id: Tensor | None) -> Tensor:
    """M V; arguments as in `low_rank_mix`."""
    if sequence_id is None:
        state = torch.einsum("blhd,blhp->bhdp", k, v)
        return torch.einsum("bthd,bhdp->bthp", q, state)
    if v.shape[1] <= BLOCKS_LENGTH:
        return mix_in_blocks(low_rank_block, [q.transpose(1, 2), k.transpose(1, 2)], v, sequence_id)
    # A state that forgets nothing but at the end of its sequence.
    return mix_both_ways(_recur, q, k, v, v.new_zeros(v.shape[:3]), sequence_id)


def _recur(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, sequence_id: Tensor | None) -> Tensor:
    return linear_recurrence_torch(q, k, v, log_decay, None, sequence_id, CHUNK)[0]
