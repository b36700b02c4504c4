"""GSS, gated state spaces (arXiv 2206.13947): a diagonal state space on few channels and a wide multiplicative gate."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from anymixer.mixers.base import register_mixer
from anymixer.mixers.s4d import S4D


@register_mixer("gss")
class GSS(S4D):
    """W_o (W_y SSM(act(W_u x)) * act(W_v x)), with W_u to d_model / 4 channels and W_v to 4 d_model; steps of 1 and
    B = 1 stay as they are. The paper's frequencies are learned as logarithms, here as they are."""

    @dataclass(kw_only=True)
    class Config(S4D.Config):
        """`S4D`'s options, with GSS's defaults."""

        init: Literal["lin", "inv", "legs", "rand", "real"] = "rand"
        output: Literal["glu", "linear", "gate"] = "gate"
        gate_expand: int = 4
        bottleneck: int = 4
        dt_min: float = 1.0
        dt_max: float = 1.0

    def __init__(self, d_model: int, *, layer_idx: int | None = None, **options: Any) -> None:
        """d_model: width in and out; options: the fields of `Config`."""
        super().__init__(d_model, layer_idx=layer_idx, **options)
        for name in ("log_dt", "B"):
            value: nn.Parameter = getattr(self, name)
            delattr(self, name)
            self.register_buffer(name, value.data)
