"""DSS, diagonal state spaces (arXiv 2203.14343): S4D whose modes are normalized by their sum over a row's places."""

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from anymixer.errors import UserError
from anymixer.layers.discretize import Pair, exp_minus_one, over, times
from anymixer.mixers.base import register_mixer
from anymixer.mixers.s4d import S4D

# Keeps the sum of the places, of modes that hardly decay, from being 0 where they have turned full circle.
EPSILON = 1e-7


@register_mixer("dss")
class DSS(S4D):
    """K_l = 2 Re sum_n C_n B_n / A_n softmax_l(l dt A_n), the softmax over l = 0 .. l_max - 1.

    l_max is an option, not the row's length, with which the kernel would change and padding would count. All modes
    decay, so that later lags go on as they began, and the state is S4D's: DSS as published has no recurrent form.
    """

    @dataclass(kw_only=True)
    class Config(S4D.Config):
        """l_max: how many places the softmax sums over. init: `S4D`'s; legs is the published one."""

        init: Literal["lin", "inv", "legs", "rand", "real"] = "legs"
        disc: Literal["softmax"] = "softmax"  # type: ignore[assignment]
        l_max: int = 1024

        def validate(self, d_model: int, path: str) -> None:
            super().validate(d_model, path)
            if self.l_max < 1:
                raise UserError(f"{path}.l_max: {self.l_max} is below 1")

    config: Config

    def _discretize(self, A: Pair, dt: Tensor) -> tuple[Tensor, Tensor, Pair]:
        """exp(dt A), and 1 / A over the sum of the places' exponentials, a geometric series."""
        log_decay, angle = dt * A[0], dt * A[1]
        re, im = exp_minus_one(self.config.l_max * log_decay, self.config.l_max * angle)
        size = re.square() + im.square() + EPSILON
        per_place = times(exp_minus_one(log_decay, angle), (re / size, -im / size))
        return log_decay, angle, over(per_place, A)
