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
from anymixer.mixers.base import SequenceMixer, State, register_mixer


@register_mixer("attention")
class Attention(SequenceMixer):
    """Multi-head softmax attention over the tokens of each sequence."""

    @dataclass(kw_only=True)
    class Config(SequenceMixer.Config):
        """num_heads: None gives heads of 64 channels. positions: how a score knows the distance of its tokens;
        `none` leaves that to the model's learned position embeddings. dropout: of the attention weights.
        causal: no token sees a later one, as language models need. num_kv_heads: fewer heads of keys and values,
        each serving several of queries (arXiv 2305.13245); None for as many as queries. qk_norm: RMSNorm of queries
        and keys over each head's channels, before rotary positions."""

        num_heads: int | None = None
        bias: bool = True
        dropout: float = 0.0
        positions: Literal["none", "rotary", "alibi"] = "none"
        rotary_theta: float = 10000.0
        causal: bool = False
        num_kv_heads: int | None = None
        qk_norm: bool = False

        def validate(self, d_model: int, path: str) -> None:
            heads = self.resolve_num_heads(d_model)
            if heads < 1 or d_model % heads:
                raise UserError(f"{path}.num_heads: {heads} does not divide d_model = {d_model}")
            if self.num_kv_heads is not None and (self.num_kv_heads < 1 or heads % self.num_kv_heads):
                raise UserError(f"{path}.num_kv_heads: {self.num_kv_heads} does not divide the {heads} heads")
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
        self.num_kv_heads = config.num_kv_heads or self.num_heads
        self.headdim = d_model // self.num_heads
        # One projection for all three, so that a plain attention layer's state dict does not change its names.
        self.qkv_proj = nn.Linear(d_model, (self.num_heads + 2 * self.num_kv_heads) * self.headdim, bias=config.bias)
        self.out_proj = nn.Linear(d_model, d_model, bias=config.bias)
        if config.qk_norm:
            self.q_norm = nn.RMSNorm(self.headdim, eps=1e-6)
            self.k_norm = nn.RMSNorm(self.headdim, eps=1e-6)

    def _project(self, hidden_states: Tensor, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [batch, num_heads, length, headdim], keys and values [batch, num_kv_heads, length, headdim]; the
        first token stands at position `start`."""
        heads = self.qkv_proj(hidden_states).unflatten(-1, (-1, self.headdim)).transpose(1, 2)
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.config.positions == "rotary":
            q, k = (apply_rotary(t, self.config.rotary_theta, start) for t in (q, k))
        return q, k, v

    def _for_all_heads(self, heads: Tensor) -> Tensor:
        """Keys or values repeated for the queries they serve: [batch, num_heads, length, headdim]."""
        return heads.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1)

    def _score_mask(self, q: Tensor, packing: Packing | None) -> Tensor | None:
        """What is added to (float) or allowed in (bool) the scores, broadcastable to [batch, heads, length, length]."""
        mask = None if packing is None else packing.visible_keys()
        if self.config.causal:
            length = q.shape[-2]
            past = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
            # Padding before a sequence sees itself, so that its softmax is no NaN.
            mask = past if mask is None else (mask & past) | torch.eye(length, dtype=torch.bool, device=q.device)
        if self.config.positions != "alibi":
            return mask
        bias = alibi_bias(self.num_heads, q.shape[-2], q.device, q.dtype)
        return bias if mask is None else bias.masked_fill(~mask, -torch.inf)

    def forward(self, hidden_states: Tensor, packing: Packing | None = None) -> Tensor:
        """[batch, length, d_model] -> the same shape; see `SequenceMixer.forward`."""
        return self._attend(*self._project(hidden_states), packing)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing | None) -> Tensor:
        dropout = self.config.dropout if self.training else 0.0
        # Without padding the causal mask is left to the kernel, which then skips half of the work.
        whole = self.config.causal and packing is None and self.config.positions != "alibi"
        mixed = scaled_dot_product_attention(
            q,
            self._for_all_heads(k),
            self._for_all_heads(v),
            attn_mask=None if whole else self._score_mask(q, packing),
            dropout_p=dropout,
            is_causal=whole,
        )
        return self._merge(mixed)

    def matrix(self, hidden_states: Tensor, packing: Packing | None = None) -> Tensor:
        """Attention weights: [batch, num_heads, length, length]."""
        q, k, _ = self._project(hidden_states)
        scores = q @ self._for_all_heads(k).transpose(-1, -2) / math.sqrt(self.headdim)
        mask = self._score_mask(q, packing)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        return scores.softmax(dim=-1)

    def values(self, hidden_states: Tensor, packing: Packing | None = None) -> Tensor:
        """V per head: [batch, num_heads, length, headdim]."""
        return self._for_all_heads(self._project(hidden_states)[2])

    def output(self, mixed: Tensor, hidden_states: Tensor, packing: Packing | None = None) -> Tensor:
        """Output projection of [batch, num_heads, length, headdim]."""
        return self._merge(mixed)

    def _merge(self, mixed: Tensor) -> Tensor:
        return self.out_proj(mixed.transpose(1, 2).flatten(-2))

    def init_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """An empty cache of keys and values, and which of them are real."""
        empty = torch.empty(batch, self.num_kv_heads, 0, self.headdim, device=device, dtype=dtype)
        return {"k": empty, "v": empty, "real": torch.empty(batch, 0, dtype=torch.bool, device=device)}

    def prefill(self, hidden_states: Tensor, packing: Packing | None = None) -> tuple[Tensor, State]:
        """See `SequenceMixer.prefill`."""
        q, k, v = self._project(hidden_states)
        real = packing.real if packing is not None else k.new_ones(k.shape[0], k.shape[2], dtype=torch.bool)
        return self._attend(q, k, v, packing), {"k": k, "v": v, "real": real}

    def step(self, hidden_states: Tensor, state: State) -> tuple[Tensor, State]:
        """See `SequenceMixer.step`; the cache grows by one token."""
        length = state["k"].shape[2]
        q, k, v = self._project(hidden_states[:, None], start=length)
        k, v = torch.cat([state["k"], k], dim=2), torch.cat([state["v"], v], dim=2)
        real = torch.cat([state["real"], state["real"].new_ones(k.shape[0], 1)], dim=1)
        mask = real[:, None, None]
        if self.config.positions == "alibi":
            bias = alibi_bias(self.num_heads, length + 1, q.device, q.dtype, queries=1)
            mask = bias.masked_fill(~mask, -torch.inf)
        mixed = scaled_dot_product_attention(q, self._for_all_heads(k), self._for_all_heads(v), attn_mask=mask)
        return self._merge(mixed)[:, 0], {"k": k, "v": v, "real": real}

    def state_size(self, length: int, dtype: torch.dtype = torch.float32) -> int:
        """See `SequenceMixer.state_size`."""
        return length * (2 * self.num_kv_heads * self.headdim * dtype.itemsize + 1)
