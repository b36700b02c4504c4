"""Softmax attention (arXiv 1706.03762), the baseline mixer: flash through `scaled_dot_product_attention`."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from anymixer_kernels.cached_attention import attend_to_cache
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from anymixer.layers.packed_attention import attend_in_sequences, prefers_sequences
from anymixer.layers.packing import Packing
from anymixer.layers.positions import alibi_bias, apply_rotary
from anymixer.mixers.base import State, register_mixer
from anymixer.mixers.softmax_heads import SoftmaxHeads


@register_mixer("attention")
class Attention(SoftmaxHeads):
    """Multi-head softmax attention over the tokens of each sequence."""

    projects_first = True

    @dataclass(kw_only=True)
    class Config(SoftmaxHeads.Config):
        """As in `SoftmaxHeads`."""

        positions: Literal["none", "rotary", "alibi"] = "none"

    def __init__(self, d_model: int, *, layer_idx: int | None = None, **options: Any) -> None:
        """d_model: width in and out; options: the fields of `Config`."""
        super().__init__(d_model, options)
        self._add_output(d_model)

    def _project(self, hidden_states: Tensor, start: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [batch, num_heads, length, headdim], keys and values [batch, num_kv_heads, length, headdim]; the
        first token stands at position `start`."""
        q, k, v = self._split(hidden_states)
        if self.config.positions == "rotary":
            q, k = (apply_rotary(t, self.config.rotary_theta, start) for t in (q, k))
        return q, k, v

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
        k, v = self._for_all_heads(k), self._for_all_heads(v)
        alibi = self.config.positions == "alibi"
        if packing is not None and not alibi and prefers_sequences(q):
            causal = self.config.causal
            return self._merge(attend_in_sequences(q, k, v, packing, causal=causal, dropout=dropout))
        # Without padding the causal mask is left to the kernel, which then skips half of the work.
        whole = self.config.causal and packing is None and not alibi
        mask = None if whole else self._score_mask(q, packing)
        return self._merge(scaled_dot_product_attention(q, k, v, mask, dropout, whole))

    def matrix(self, hidden_states: Tensor, packing: Packing | None = None) -> Tensor:
        """Attention weights: [batch, num_heads, length, length]."""
        q, k, _ = self._project(hidden_states)
        scores = q @ self._for_all_heads(k).transpose(-1, -2) / math.sqrt(self.headdim)
        mask = self._score_mask(q, packing)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        return scores.softmax(dim=-1)

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
        # Parts of one projection: kept as they are, they would keep its queries too.
        kept = {"k": _copy(k), "v": _copy(v), "real": real}
        return self._attend(q, k, v, packing), kept

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
        return self._merge(attend_to_cache(q, k, v, mask))[:, 0], {"k": k, "v": v, "real": real}

    def state_size(self, length: int, dtype: torch.dtype = torch.float32) -> int:
        """See `SequenceMixer.state_size`."""
        return length * (2 * self.num_kv_heads * self.headdim * dtype.itemsize + 1)


def _copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)
