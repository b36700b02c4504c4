"""The layer of S4's published code, as a plain module for models of one's own."""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout

from anymixer.layers.packing import Packing
from anymixer.mixers.base import State, build_mixer

MIXERS = {"dplr": "s4", "diag": "s4d", "dss": "dss", "conv": "longconv", "ema": "ema", "lssl": "lssl"}


class S4Block(nn.Module):
    """A convolution of every channel, D, GELU, a linear map with a gate, and dropout; no norm and no residual.

    from anymixer import S4Block
    y = S4Block(d_model=64, mode="diag", bidirectional=True, dropout=0.1)(x)    # x, y: [batch, length, d_model]
    """

    def __init__(
        self,
        d_model: int,
        *,
        mode: Literal["dplr", "diag", "dss", "conv", "ema", "lssl"] = "dplr",
        bidirectional: bool = False,
        dropout: float = 0.0,
        tie_dropout: bool = True,
        **options: Any,
    ) -> None:
        """mode: the kernel. tie_dropout: drop a channel of a sequence at all places or at none. options: those of the
        mixer (`anymixer mixers`). Raises UserError for one that it does not have."""
        super().__init__()
        self.mixer = build_mixer({"name": MIXERS[mode], "causal": not bidirectional, **options}, d_model, path=mode)
        self.dropout, self.tie_dropout = dropout, tie_dropout

    def forward(self, x: Tensor, packing: Packing | None = None) -> Tensor:
        """[batch, length, d_model] -> the same shape; packing: see `SequenceMixer.forward`."""
        y = self.mixer(x, packing)
        if not self.tie_dropout:
            return dropout(y, self.dropout, self.training)
        return y * dropout(torch.ones_like(y[:, :1]), self.dropout, self.training)

    def step(self, x: Tensor, state: State) -> tuple[Tensor, State]:
        """One token of each row, without dropout: [batch, d_model] and a state from `self.mixer.init_state(batch)`."""
        return self.mixer.step(x, state)
