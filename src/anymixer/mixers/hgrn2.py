"""HGRN2 (arXiv 2404.07904): gated linear attention whose key is one minus its forget gate, with a lower bound on the
gate that grows with depth."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from anymixer.errors import UserError
from anymixer.layers.param_hints import ParamHint
from anymixer.mixers.base import register_mixer
from anymixer.mixers.linear_recurrent import LinearRecurrentMixer, RecurrenceInputs

ACTIVATIONS = {"none": lambda x: x, "silu": silu, "sigmoid": torch.sigmoid}
Activation = Literal["none", "silu", "sigmoid"]


class LowerBounds(nn.Module):
    """The lower bounds of all layers: a cumulative softmax over depth, 0 in the first layer, below 1 in the last."""

    def __init__(self, num_layers: int, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(num_layers, d_model))

    def forward(self, layer: int) -> Tensor:
        """The bound of a layer's gates: [d_model]."""
        shares = torch.softmax(self.weight.float(), dim=0)
        return shares.cumsum(0)[layer] - shares[0]

    def param_hints(self) -> dict[str, ParamHint]:
        """No weight decay: it would draw the bounds towards equal steps."""
        return {"weight": ParamHint(weight_decay=False)}


@register_mixer("hgrn2")
class HGRN2(LinearRecurrentMixer):
    """S_t = Diag(f) S_{t-1} + (1 - f) v^T, y = o^T S: no keys but the forget gate, no positions.

    In its bidirectional form a second recurrence, from the end of the row, shares all projections and the norm; a
    token's own part, which the authors' code counts twice, counts once.
    """

    @dataclass(kw_only=True)
    class Config(LinearRecurrentMixer.Config):
        """causal: no token sees a later one. expand_ratio: head size, and so state numbers per channel (the published
        variants `expand2` and `outproduct_N`). lower_bound: of the forget gate, for a layer on its own; None lets a
        model's layers share learned bounds that grow with depth. value_activation, output_activation: of v and of o
        (the published language models'; its LRA and MQAR code has silu and sigmoid)."""

        causal: bool = False
        expand_ratio: int = 128
        lower_bound: float | None = None
        value_activation: Activation = "none"
        output_activation: Activation = "silu"
        norm_eps: float = 1e-5
        bias: bool = False

        def validate(self, d_model: int, path: str) -> None:
            if self.expand_ratio < 1 or d_model % self.expand_ratio:
                raise UserError(f"{path}.expand_ratio: {self.expand_ratio} does not divide d_model = {d_model}")
            if self.lower_bound is not None and not 0 <= self.lower_bound < 1:
                raise UserError(f"{path}.lower_bound: {self.lower_bound} is not in [0, 1)")

    def __init__(self, d_model: int, *, layer_idx: int | None = None, **options: Any) -> None:
        """d_model: width in and out; options: the fields of `Config`; layer_idx: for the shared lower bounds."""
        super().__init__()
        config = self.Config(**options)
        config.validate(d_model, type(self).__name__)
        self.config = config
        self.causal = config.causal
        self.d_state = self.value_width = config.expand_ratio
        self.nheads = d_model // config.expand_ratio
        self.conv = None
        self.in_proj = nn.Linear(d_model, 3 * d_model, bias=config.bias)
        self.norm = nn.RMSNorm(d_model, eps=config.norm_eps)
        self.out_proj = nn.Linear(d_model, d_model, bias=config.bias)
        self._bounds: tuple[LowerBounds, int] | None = None

    @classmethod
    def share_between_layers(cls, mixers: list[Any], d_model: int) -> nn.Module | None:
        """The learned lower bounds of those layers that have none of their own."""
        sharing = [mixer for mixer in mixers if mixer.config.lower_bound is None]
        if not sharing:
            return None
        bounds = LowerBounds(len(sharing), d_model)
        for place, mixer in enumerate(sharing):
            mixer._bounds = (bounds, place)  # in a tuple: the bounds are no submodule of every layer
        return bounds

    def _lower_bound(self) -> Tensor | float:
        if self._bounds is not None:
            bounds, place = self._bounds
            return bounds(place)
        return self.config.lower_bound or 0.0

    def _project(self, hidden_states: Tensor) -> tuple[Tensor, Any]:
        return self.in_proj(hidden_states), None

    def _inputs(self, convolved: Tensor, passed: Any) -> RecurrenceInputs:
        values, outputs, gates = convolved.chunk(3, dim=-1)
        gates = gates.to(torch.promote_types(gates.dtype, torch.float32))
        bound = self._lower_bound()
        # Not f and then 1 - f: where f is near 1, that would lose the key.
        key = (1 - bound) * torch.sigmoid(-gates)
        # Where the bound is 0, f may round to 0, of which there is no logarithm; the smallest f will do.
        log_decay = torch.log1p(-key.clamp(max=1 - torch.finfo(key.dtype).eps))
        heads = (self.nheads, self.d_state)
        return RecurrenceInputs(
            q=ACTIVATIONS[self.config.output_activation](outputs).unflatten(-1, heads),
            k=key.unflatten(-1, heads),
            v=ACTIVATIONS[self.config.value_activation](values).unflatten(-1, heads),
            log_decay=log_decay.unflatten(-1, heads),
        )

    def _finish(self, mixed: Tensor, inputs: RecurrenceInputs) -> Tensor:
        return self.out_proj(self.norm(mixed.flatten(-2)))
