"""Dynamic Mask Attention (arXiv 2412.11834), Doge's mixer: attention over the keys that are worth keeping."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from anymixer_kernels.dynamic_mask import (
    attend_with_bias,
    dynamic_mask_attention,
    dynamic_mask_matrix,
    extend_cache,
    fill_cache,
)
from torch import Tensor, nn
from torch.nn.functional import linear, softplus

from anymixer.errors import UserError
from anymixer.layers.packing import Packing
from anymixer.layers.param_hints import ParamHint
from anymixer.layers.positions import apply_rotary, rotate
from anymixer.mixers.base import State, register_mixer
from anymixer.mixers.softmax_heads import SoftmaxHeads


@register_mixer("dma")
class DynamicMaskAttention(SoftmaxHeads):
    """Softmax attention whose keys carry a learned bias, b = exp(A softplus(W V)), and of which a query sees the
    `keep_window_size` with the greatest; so the cache of a decoder has that many entries, whatever it has read."""

    @dataclass(kw_only=True)
    class Config(SoftmaxHeads.Config):
        """As in `SoftmaxHeads`, and: each head of keys has a bias and a choice of keys of its own. keep_window_size:
        keys that a query sees at most; of equal ones the later is kept. causal: also, no choice of keys knows of a
        later one; else all queries of a sequence share one choice. key_bias: `exp` as above, or `linear`,
        A softplus(W V), which cannot overflow. norm_eps: of qk_norm."""

        keep_window_size: int = 2048
        key_bias: Literal["exp", "linear"] = "exp"
        positions: Literal["none", "rotary"] = "rotary"
        norm_eps: float = 1e-6
        bias: bool = False

        def validate(self, d_model: int, path: str) -> None:
            super().validate(d_model, path)
            if self.keep_window_size < 1:
                raise UserError(f"{path}.keep_window_size: {self.keep_window_size} is below 1")

    def __init__(self, d_model: int, *, layer_idx: int | None = None, **options: Any) -> None:
        """d_model: width in and out; options: the fields of `Config`."""
        super().__init__(d_model, options)
        self.dt_proj = nn.Linear(self.num_kv_heads * self.headdim, self.num_kv_heads, bias=self.config.bias)
        self.A = nn.Parameter(torch.empty(self.num_kv_heads))
        self._add_output(d_model, self.config.norm_eps)
        self.reset_own_parameters()

    def reset_own_parameters(self) -> None:
        """A = 0: every key's bias is the same, so the layer begins as attention in a sliding window."""
        nn.init.zeros_(self.A)

    def param_hints(self) -> dict[str, ParamHint]:
        """No weight decay on A."""
        return {"A": ParamHint(weight_decay=False)}

    def _project(self, hidden_states: Tensor, places: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries [batch, num_heads, length, headdim], keys and values [batch, num_kv_heads, length, headdim], and the
        keys' bias [batch, num_kv_heads, length]. places: of the tokens, [batch, 1, length]; None from 0."""
        q, k, v = self._split(hidden_states)
        if self.config.positions == "rotary":
            theta = self.config.rotary_theta
            q, k = (apply_rotary(t, theta) if places is None else rotate(t, places, theta) for t in (q, k))
        return q, k, v, self._key_bias(hidden_states, v)

    def _key_bias(self, hidden_states: Tensor, values: Tensor) -> Tensor:
        """b in float32 or wider, also under autocast: [batch, num_kv_heads, length].

        It decides which keys are kept. Equal tokens are equal in the first layer, and in float32 a matrix product
        rounds equal rows unequally, differently in a step than in a whole row; so the value is that of float64, rounded
        once, and the gradient that of float32, whose saved tensors are half as large. A projection that was replaced,
        by one with an adapter beside it, is no matrix to multiply: its bias is that of its rounded values.
        """
        wide = torch.promote_types(hidden_states.dtype, torch.float32)
        with torch.autocast(hidden_states.device.type, enabled=False):
            if type(self.qkv_proj) is not nn.Linear or type(self.dt_proj) is not nn.Linear:
                return self._bias_of(self.dt_proj(values.transpose(1, 2).flatten(-2).to(self.A.dtype)).to(wide))
            bias = self._key_bias_in(wide, hidden_states)
            if wide == torch.float64:
                return bias
            with torch.no_grad():
                exact = self._key_bias_in(torch.float64, hidden_states).to(wide)
            return exact + (bias - bias.detach())

    def _key_bias_in(self, dtype: torch.dtype, hidden_states: Tensor) -> Tensor:
        """The two projections before it are one matrix, which spares it the rounding of the values."""
        width = self.num_kv_heads * self.headdim
        weight, bias = self.dt_proj.weight.to(dtype), self.dt_proj.bias
        if bias is not None:
            bias = torch.addmv(bias.to(dtype), weight, self.qkv_proj.bias[-width:].to(dtype))
        weight = weight @ self.qkv_proj.weight[-width:].to(dtype)
        return self._bias_of(linear(hidden_states.to(dtype), weight, bias))

    def _bias_of(self, steps: Tensor) -> Tensor:
        """b of W V, [batch, length, num_kv_heads], in its dtype: [batch, num_kv_heads, length]."""
        exponent = (self.A.to(steps.dtype) * softplus(steps)).transpose(1, 2)
        return exponent.exp() if self.config.key_bias == "exp" else exponent

    def forward(self, hidden_states: Tensor, packing: Packing | None = None) -> Tensor:
        """[batch, length, d_model] -> the same shape; see `SequenceMixer.forward`."""
        return self._attend(*self._project(hidden_states), packing)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor, packing: Packing | None) -> Tensor:
        mixed = dynamic_mask_attention(
            q,
            k,
            v,
            key_bias,
            keep=self.config.keep_window_size,
            causal=self.config.causal,
            sequence_id=None if packing is None else packing.sequence_id,
            packed=packing is not None and packing.packed,
            dropout=self.config.dropout if self.training else 0.0,
        )
        return self._merge(mixed)

    def matrix(self, hidden_states: Tensor, packing: Packing | None = None) -> Tensor:
        """Attention weights: [batch, num_heads, length, length]."""
        q, k, _, key_bias = self._project(hidden_states)
        ids = None if packing is None else packing.sequence_id
        return dynamic_mask_matrix(q, k, key_bias, self.config.keep_window_size, self.config.causal, ids)

    def init_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """An empty cache, and how many tokens each row has read."""
        self._check_causal()
        shape = (batch, self.num_kv_heads, 0)
        wide = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        return {
            "k": torch.empty(*shape, self.headdim, device=device, dtype=dtype),
            "v": torch.empty(*shape, self.headdim, device=device, dtype=dtype),
            "bias": torch.empty(shape, device=device, dtype=wide),
            "real": torch.empty(shape, device=device, dtype=torch.bool),
            "seen": torch.zeros(batch, device=device, dtype=torch.int64),
        }

    def _check_causal(self) -> None:
        if not self.config.causal:
            raise NotImplementedError("dma with causal: false has no state: its tokens see later ones")

    def prefill(self, hidden_states: Tensor, packing: Packing | None = None) -> tuple[Tensor, State]:
        """See `SequenceMixer.prefill`; the whole prompt at once."""
        self._check_causal()
        q, k, v, key_bias = self._project(hidden_states)
        batch, length = hidden_states.shape[:2]
        real = key_bias.new_ones(batch, length, dtype=torch.bool) if packing is None else packing.real
        state = fill_cache(k, v, key_bias, real, self.config.keep_window_size)
        state["seen"] = torch.full((batch,), length, device=q.device)
        return self._attend(q, k, v, key_bias, packing), state

    def step(self, hidden_states: Tensor, state: State) -> tuple[Tensor, State]:
        """See `SequenceMixer.step`; beyond `keep_window_size` entries, each new one drives the worst out."""
        self._check_causal()
        q, k, v, key_bias = self._project(hidden_states[:, None], state["seen"][:, None, None])
        after = extend_cache(state, k, v, key_bias, self.config.keep_window_size)
        mixed = attend_with_bias(q, after["k"], after["v"], after["bias"], after["real"][:, :, None])
        return self._merge(mixed)[:, 0], {**after, "seen": state["seen"] + 1}

    def state_size(self, length: int, dtype: torch.dtype = torch.float32) -> int:
        """See `SequenceMixer.state_size`; it grows up to `keep_window_size` tokens."""
        entry = 2 * self.headdim * dtype.itemsize + torch.promote_types(dtype, torch.float32).itemsize + 1
        return min(length, self.config.keep_window_size) * self.num_kv_heads * entry + torch.int64.itemsize
