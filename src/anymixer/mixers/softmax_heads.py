"""What mixers by softmax attention have in common: their options, their projections, and how heads are taken apart."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from anymixer.errors import UserError
from anymixer.layers.packing import Packing
from anymixer.mixers.base import SequenceMixer


class SoftmaxHeads(SequenceMixer):
    """Queries of all heads, keys and values of as many or fewer, and one projection of what they give."""

    @dataclass(kw_only=True)
    class Config(SequenceMixer.Config):
        """num_heads: None gives heads of 64 channels. num_kv_heads: fewer heads of keys and values, each serving
        several of queries (arXiv 2305.13245); None for as many as queries. positions: how a score knows the distance
        of its tokens; `none` leaves that to the model's learned position embeddings. causal: no token sees a later
        one, as language models need. qk_norm: RMSNorm of queries and keys over each head's channels, before rotary
        positions. dropout: of the attention weights."""

        num_heads: int | None = None
        num_kv_heads: int | None = None
        positions: str = "none"
        rotary_theta: float = 10000.0
        causal: bool = False
        qk_norm: bool = False
        dropout: float = 0.0
        bias: bool = True

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

    def __init__(self, d_model: int, options: dict[str, Any]) -> None:
        """The heads and their first projection; a subclass adds the last one with `_add_output`, so that the order of
        its parameters is its own. options: the fields of `Config`."""
        super().__init__()
        config = self.Config(**options)
        config.validate(d_model, type(self).__name__)
        self.config: Any = config
        self.num_heads = config.resolve_num_heads(d_model)
        self.num_kv_heads = config.num_kv_heads or self.num_heads
        self.headdim = d_model // self.num_heads
        # One projection for all three, so that a plain attention layer's state dict does not change its names.
        self.qkv_proj = nn.Linear(d_model, (self.num_heads + 2 * self.num_kv_heads) * self.headdim, bias=config.bias)

    def _add_output(self, d_model: int, norm_eps: float = 1e-6) -> None:
        self.out_proj = nn.Linear(d_model, d_model, bias=self.config.bias)
        if self.config.qk_norm:
            self.q_norm = nn.RMSNorm(self.headdim, eps=norm_eps)
            self.k_norm = nn.RMSNorm(self.headdim, eps=norm_eps)

    def _split(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [batch, num_heads, length, headdim], keys and values [batch, num_kv_heads, length, headdim], before
        they know their positions."""
        heads = self.qkv_proj(hidden_states).unflatten(-1, (-1, self.headdim)).transpose(1, 2)
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=1)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def _for_all_heads(self, heads: Tensor) -> Tensor:
        """Keys or values repeated for the queries they serve: [batch, num_heads, length, headdim]."""
        return heads.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1)

    def values(self, hidden_states: Tensor, packing: Packing | None = None) -> Tensor:
        """V per head: [batch, num_heads, length, headdim]."""
        return self._for_all_heads(self._split(hidden_states)[2])

    def output(self, mixed: Tensor, hidden_states: Tensor, packing: Packing | None = None) -> Tensor:
        """Output projection of [batch, num_heads, length, headdim]."""
        return self._merge(mixed)

    def _merge(self, mixed: Tensor) -> Tensor:
        return self.out_proj(mixed.transpose(1, 2).flatten(-2))
