"""Linear attention (arXiv 2006.16236): scores phi(q) . phi(k), normalised by their sum, in constant memory."""

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import elu, relu

from anymixer.errors import UserError
from anymixer.mixers.base import register_mixer
from anymixer.mixers.linear_recurrent import LinearRecurrentMixer, RecurrenceInputs

EPSILON = 1e-6


def taylor_features(x: Tensor) -> Tensor:
    """[1, x / n^(1/4), x x^T / sqrt(2 n)]: phi(q) . phi(k) is the second-order series of exp(q . k / sqrt(n)) (Based,
    arXiv 2402.18668). [..., n] -> [..., 1 + n + n * n]."""
    n = x.shape[-1]
    square = (x[..., :, None] * x[..., None, :]).flatten(-2) / math.sqrt(2 * n)
    return torch.cat([torch.ones_like(x[..., :1]), x / n**0.25, square], dim=-1)


FEATURES = {"elu": lambda x: elu(x) + 1, "relu": relu, "taylor": taylor_features}


@dataclass(kw_only=True)
class HeadsConfig(LinearRecurrentMixer.Config):
    """num_heads: None gives heads of 64 channels. feature_dim: width of queries and keys per head."""

    ALWAYS_CAUSAL: ClassVar[bool] = True

    num_heads: int | None = None
    feature_dim: int = 16
    bias: bool = True

    def validate(self, d_model: int, path: str) -> None:
        """Raise UserError, naming `path` and the key, when the options do not fit `d_model`."""
        heads = self.resolve_num_heads(d_model)
        if heads < 1 or d_model % heads:
            raise UserError(f"{path}.num_heads: {heads} does not divide d_model = {d_model}")
        if self.feature_dim < 1:
            raise UserError(f"{path}.feature_dim: {self.feature_dim} is not positive")

    def resolve_num_heads(self, d_model: int) -> int:
        """The number of heads in use."""
        return max(1, d_model // 64) if self.num_heads is None else self.num_heads


@register_mixer("linear_attention")
class LinearAttention(LinearRecurrentMixer):
    """Attention with a feature map in place of the exponential: every token before counts, none is forgotten."""

    @dataclass(kw_only=True)
    class Config(HeadsConfig):
        """feature_map: elu (plus one), relu, or taylor (of the exponential, to second order)."""

        feature_map: Literal["elu", "relu", "taylor"] = "elu"

    def __init__(self, d_model: int, *, layer_idx: int | None = None, **options: Any) -> None:
        """d_model: width in and out; options: the fields of `Config`."""
        super().__init__()
        config = self.Config(**options)
        config.validate(d_model, type(self).__name__)
        self.config = config
        self.nheads = config.resolve_num_heads(d_model)
        self.headdim = d_model // self.nheads
        n = config.feature_dim
        self.d_state = 1 + n + n * n if config.feature_map == "taylor" else n
        self.value_width = self.headdim + 1  # and the sum of the scores
        self.conv = None
        self.qk_proj = nn.Linear(d_model, 2 * self.nheads * n, bias=config.bias)
        self.v_proj = nn.Linear(d_model, d_model, bias=config.bias)
        self.out_proj = nn.Linear(d_model, d_model, bias=config.bias)

    def _project(self, hidden_states: Tensor) -> tuple[Tensor, Any]:
        return self.qk_proj(hidden_states), self.v_proj(hidden_states)

    def _inputs(self, convolved: Tensor, passed: Any) -> RecurrenceInputs:
        features = FEATURES[self.config.feature_map]
        wide = torch.promote_types(convolved.dtype, torch.float32)
        q, k = convolved.to(wide).unflatten(-1, (2, self.nheads, self.config.feature_dim)).unbind(-3)
        v = passed.unflatten(-1, (self.nheads, self.headdim))
        return RecurrenceInputs(
            q=features(q),
            k=features(k),
            v=torch.cat([v, torch.ones_like(v[..., :1])], dim=-1),
            log_decay=q.new_zeros(q.shape[:-1]),
        )

    def _finish(self, mixed: Tensor, inputs: RecurrenceInputs) -> Tensor:
        summed, total = mixed.split([self.headdim, 1], dim=-1)
        return self.out_proj((summed / (total + EPSILON)).flatten(-2))


@register_mixer("normalized_attention")
class NormalizedAttention(LinearRecurrentMixer):
    """Linear attention without a feature map, divided by an exponential of the reading token alone (arXiv 2405.15731,
    equation 21)."""

    @dataclass(kw_only=True)
    class Config(HeadsConfig):
        """One head unless `num_heads` says otherwise, as published."""

        num_heads: int | None = 1

    def __init__(self, d_model: int, *, layer_idx: int | None = None, **options: Any) -> None:
        """d_model: width in and out; options: the fields of `Config`."""
        super().__init__()
        config = self.Config(**options)
        config.validate(d_model, type(self).__name__)
        self.config = config
        self.nheads = config.resolve_num_heads(d_model)
        self.d_state, self.value_width = config.feature_dim, d_model // self.nheads
        self.conv = None
        self.qk_proj = nn.Linear(d_model, 2 * self.nheads * self.d_state, bias=config.bias)
        self.v_proj = nn.Linear(d_model, d_model, bias=config.bias)
        self.normalizer = nn.Linear(d_model, self.nheads)
        self.out_proj = nn.Linear(d_model, d_model, bias=config.bias)

    def _project(self, hidden_states: Tensor) -> tuple[Tensor, Any]:
        return self.qk_proj(hidden_states), (self.v_proj(hidden_states), self.normalizer(hidden_states))

    def _inputs(self, convolved: Tensor, passed: Any) -> RecurrenceInputs:
        values, normalizer = passed
        q, k = convolved.unflatten(-1, (2, self.nheads, self.d_state)).unbind(-3)
        # The published recurrence decays by exp(w[t-1] - w[t]); the product of these telescopes to what the reading
        # token divides by, which needs no decay and cannot overflow on the way.
        scale = torch.exp(-normalizer.to(torch.promote_types(normalizer.dtype, torch.float32)))
        return RecurrenceInputs(
            q=(q * scale[..., None]).to(q.dtype),
            k=k,
            v=values.unflatten(-1, (self.nheads, self.value_width)),
            log_decay=torch.zeros_like(scale),
        )

    def _finish(self, mixed: Tensor, inputs: RecurrenceInputs) -> Tensor:
        return self.out_proj(mixed.flatten(-2))
