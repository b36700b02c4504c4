"""What every channel mixer is, and the registry that YAML files choose from."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anymixer.registry import Registry


def identity(x: Tensor) -> Tensor:
    """x as it is: the activation of a bilinear GLU."""
    return x


ACTIVATIONS = {"gelu": F.gelu, "silu": F.silu, "relu": F.relu, "sigmoid": torch.sigmoid, "none": identity}
Activation = Literal["gelu", "silu", "relu", "sigmoid", "none"]


class ChannelMixer(nn.Module):
    """Base of channel mixers: `forward(hidden_states [batch, length, d_model])` of the same shape. projects_first: as
    of `SequenceMixer`."""

    projects_first: ClassVar[bool] = False

    @dataclass(kw_only=True)
    class Config:
        """intermediate_size: inner width. bias: of every projection."""

        intermediate_size: int = 3072
        activation: Activation = "gelu"
        bias: bool = True

    def __init__(self, d_model: int, config: Config) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]

    def reset_own_parameters(self) -> None:
        """Draw the parameters that are neither a Linear's nor a norm's anew; models call it per layer."""


channel_mixers: Registry[ChannelMixer] = Registry("channel mixer")
