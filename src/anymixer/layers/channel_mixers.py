"""Channel mixers: what acts on each token alone, after the sequence mixer."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from anymixer.layers.cdmoe import CDMoE
from anymixer.layers.channel_mixer_base import ACTIVATIONS, Activation, ChannelMixer, channel_mixers

__all__ = ["ACTIVATIONS", "GLU", "MLP", "Activation", "CDMoE", "ChannelMixer", "channel_mixers"]


@channel_mixers.register("mlp")
class MLP(ChannelMixer):
    """down(activation(up(x))), BERT's feed-forward layer (arXiv 1810.04805)."""

    projects_first = True

    def __init__(self, d_model: int, config: ChannelMixer.Config) -> None:
        super().__init__(d_model, config)
        self.up = nn.Linear(d_model, config.intermediate_size, bias=config.bias)
        self.down = nn.Linear(config.intermediate_size, d_model, bias=config.bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down(self.activation(self.up(hidden_states)))


@channel_mixers.register("glu")
class GLU(ChannelMixer):
    """down(activation(gate(x)) * up(x)): GeGLU with gelu, SwiGLU with silu, ReGLU with relu, the GLU itself with
    sigmoid, bilinear with none (arXiv 2002.05202).

    gate and up are one projection; only `down` may carry a bias besides them (`down_bias`), as in MosaicBERT.
    """

    projects_first = True

    @dataclass(kw_only=True)
    class Config(ChannelMixer.Config):
        bias: bool = False
        down_bias: bool = True

    def __init__(self, d_model: int, config: Any) -> None:
        super().__init__(d_model, config)
        self.gate_up = nn.Linear(d_model, 2 * config.intermediate_size, bias=config.bias)
        self.down = nn.Linear(config.intermediate_size, d_model, bias=config.down_bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate, up = self.gate_up(hidden_states).chunk(2, dim=-1)
        return self.down(self.activation(gate) * up)
