"""Composer's LowPrecisionLayerNorm for our residuals too, whose norm is fused with the sum before it."""

from composer.algorithms import LowPrecisionLayerNorm as ComposersLowPrecisionLayerNorm
from composer.core import Event, State
from composer.loggers import Logger

from anymixer.models.backbone import Residual


class LowPrecisionLayerNorm(ComposersLowPrecisionLayerNorm):
    """Norms return autocast's dtype instead of float32, so that between layers half the bytes move.

    Composer's own replaces the modules. A residual that normalises after its sum adds in float32 and rounds once, after
    the norm; called through Composer's module it would round before and after.
    """

    def apply(self, event: Event, state: State, logger: Logger) -> int | None:
        """Replace the norms of the model, and tell its residuals."""
        super().apply(event, state, logger)
        for module in state.model.modules():
            if isinstance(module, Residual):
                module.low_precision = True
        return None
