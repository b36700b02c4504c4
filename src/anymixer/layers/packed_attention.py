"""Softmax attention inside each sequence of a batch, without the mask of length x length that rows of several need."""

import warnings

import torch
from torch import Tensor
from torch.nested import nested_tensor_from_jagged
from torch.nn.functional import scaled_dot_product_attention

from anymixer.layers.packing import Packing

# Tokens of a row up to which a mask costs little. Longer rows spend most on pairs that it hides; knowing where their
# sequences lie makes the host wait for the GPU once a batch.
MASKED_LENGTH = 512

# Of nested tensors' other layout, which making one of this layout touches.
warnings.filterwarnings("ignore", message="The PyTorch API of nested tensors is in prototype stage")


def prefers_sequences(q: Tensor) -> bool:
    """Whether queries [batch, heads, length, headdim] are better mixed by `attend_in_sequences` than under a mask."""
    length, headdim = q.shape[-2:]
    # Flash and memory-efficient kernels take sequences of any length; the CPU's do not, nor can a compiled graph.
    fits = q.is_cuda and headdim % 8 == 0 and headdim <= 256
    return fits and length > MASKED_LENGTH and not torch.compiler.is_compiling()


def attend_in_sequences(
    q: Tensor, k: Tensor, v: Tensor, packing: Packing, *, causal: bool = False, dropout: float = 0.0
) -> Tensor:
    """softmax(q k^T / sqrt(headdim)) v among the tokens of each sequence, and of each stretch of padding.

    q, k, v: [batch, heads, length, headdim], and so the result; causal: no token sees a later one.
    """
    offsets, longest = packing.runs

    def in_runs(heads: Tensor) -> Tensor:
        tokens = heads.transpose(1, 2).flatten(0, 1)
        return nested_tensor_from_jagged(tokens, offsets, min_seqlen=1, max_seqlen=longest).transpose(1, 2)

    mixed = scaled_dot_product_attention(in_runs(q), in_runs(k), in_runs(v), dropout_p=dropout, is_causal=causal)
    return mixed.transpose(1, 2).values().unflatten(0, (q.shape[0], q.shape[2])).transpose(1, 2)
