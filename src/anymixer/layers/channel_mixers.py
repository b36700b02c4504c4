"""Channel mixers: what acts on each token alone, after the sequence mixer."""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from anymixer.registry import Registry

ACTIVATIONS = {"gelu": F.gelu, "silu": F.silu, "relu": F.relu}
Activation = Literal["gelu", "silu", "relu"]


class ChannelMixer(nn.Module):
    """Base of channel mixers: `forward(hidden_states [batch, length, d_model])` of the same shape."""

    @dataclass(kw_only=True)
    class Config:
        """intermediate_size: inner width. bias: of every projection."""

        intermediate_size: int = 3072
        activation: Activation = "gelu"
        bias: bool = True

    def __init__(self, d_model: int, config: Config) -> None:
        super().__init__()
        self.activation = ACTIVATIONS[config.activation]


channel_mixers: Registry[ChannelMixer] = Registry("channel mixer")


@channel_mixers.register("mlp")
class MLP(ChannelMixer):
    """down(activation(up(x))), BERT's feed-forward layer (arXiv 1810.04805)."""

    def __init__(self, d_model: int, config: ChannelMixer.Config) -> None:
        super().__init__(d_model, config)
        self.up = nn.Linear(d_model, config.intermediate_size, bias=config.bias)
        self.down = nn.Linear(config.intermediate_size, d_model, bias=config.bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.down(self.activation(self.up(hidden_states)))


@channel_mixers.register("glu")
class GLU(ChannelMixer):
    """down(activation(gate(x)) * up(x)): GeGLU with gelu, SwiGLU with silu (arXiv 2002.05202).

    gate and up are one projection; only `down` may carry a bias besides them (`down_bias`), as in MosaicBERT.
    """

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
