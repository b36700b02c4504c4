"""Softmax attention (arXiv 1706.03762), the baseline mixer: flash through `scaled_dot_product_attention`."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from anymixer.errors import UserError
from anymixer.layers.packing import Packing
from anymixer.layers.positions import alibi_bias, apply_rotary
from anymixer.mixers.base import SequenceMixer, register_mixer


@register_mixer("attention")
class Attention(SequenceMixer):
    """Multi-head softmax attention over the tokens of each sequence."""

    @dataclass(kw_only=True)
    class Config(SequenceMixer.Config):
        """num_heads: None gives heads of 64 channels. positions: how a score knows the distance of its tokens;
        `none` leaves that to the model's learned position embeddings. dropout: of the attention weights."""

        num_heads: int | None = None
        bias: bool = True
        dropout: float = 0.0
        positions: Literal["none", "rotary", "alibi"] = "none"
        rotary_theta: float = 10000.0

        def validate(self, d_model: int, path: str) -> None:
            heads = self.resolve_num_heads(d_model)
            if heads < 1 or d_model % heads:
                raise UserError(f"{path}.num_heads: {heads} does not divide d_model = {d_model}")
            if self.positions == "rotary" and (d_model // heads) % 2:
                raise UserError(f"{path}.num_heads: rotary positions need an even head size, not {d_model // heads}")
            if not 0.0 <= self.dropout < 1.0:
                raise UserError(f"{path}.dropout: {self.dropout} is not in [0, 1)")

        def resolve_num_heads(self, d_model: int) -> int:
            """The number of heads in use."""
            return max(1, d_model // 64) if self.num_heads is None else self.num_heads

    def __init__(self, d_model: int, *, layer_idx: int | None = None, **options: Any) -> None:
        """d_model: width in and out; options: the fields of `Config`."""
        super().__init__()
        config = self.Config(**options)
        config.validate(d_model, type(self).__name__)
        self.config = config
        self.num_heads = config.resolve_num_heads(d_model)
        self.qkv_proj = nn.Linear(d_model, 3 * d_model, bias=config.bias)
        self.out_proj = nn.Linear(d_model, d_model, bias=config.bias)

    def _project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values: [batch, num_heads, length, headdim] each."""
        qkv = self.qkv_proj(hidden_states).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if self.config.positions == "rotary":
            q, k = (apply_rotary(t, self.config.rotary_theta) for t in (q, k))
        return q, k, v

    def _score_mask(self, q: Tensor, packing: Packing | None) -> Tensor | None:
        """What is added to (float) or allowed in (bool) the scores, broadcastable to [batch, heads, length, length]."""
        mask = None if packing is None else packing.visible_keys()
        if self.config.positions != "alibi":
            return mask
        bias = alibi_bias(self.num_heads, q.shape[-2], q.device, q.dtype)
        return bias if mask is None else bias.masked_fill(~mask, -torch.inf)

    def forward(self, hidden_states: Tensor, packing: Packing | None = None) -> Tensor:
        """[batch, length, d_model] -> the same shape; see `SequenceMixer.forward`."""
        q, k, v = self._project(hidden_states)
        dropout = self.config.dropout if self.training else 0.0
        mixed = scaled_dot_product_attention(q, k, v, attn_mask=self._score_mask(q, packing), dropout_p=dropout)
        return self.output(mixed, hidden_states, packing)

    def matrix(self, hidden_states: Tensor, packing: Packing | None = None) -> Tensor:
        """Attention weights: [batch, num_heads, length, length]."""
        q, k, _ = self._project(hidden_states)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        mask = self._score_mask(q, packing)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        return scores.softmax(dim=-1)

    def values(self, hidden_states: Tensor, packing: Packing | None = None) -> Tensor:
        """V per head: [batch, num_heads, length, headdim]."""
        return self._project(hidden_states)[2]

    def output(self, mixed: Tensor, hidden_states: Tensor, packing: Packing | None = None) -> Tensor:
        """Output projection of [batch, num_heads, length, headdim]."""
        return self.out_proj(mixed.transpose(1, 2).flatten(-2))
