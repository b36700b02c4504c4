"""The one backbone: residual layers of a sequence mixer and, where asked for, a channel mixer."""

from typing import Any

from torch import Tensor, nn

from anymixer.layers.channel_mixers import channel_mixers
from anymixer.layers.packing import Packing
from anymixer.mixers import build_mixer


class Residual(nn.Module):
    """hidden + dropout(mixer(hidden)), normalised after the sum, or before the mixer (prenorm)."""

    def __init__(self, mixer: nn.Module, d_model: int, *, prenorm: bool, norm_eps: float, dropout: float) -> None:
        super().__init__()
        self.mixer = mixer
        self.norm = nn.LayerNorm(d_model, eps=norm_eps)
        self.dropout = nn.Dropout(dropout)
        self.prenorm = prenorm

    def forward(self, hidden_states: Tensor, *args: Any) -> Tensor:
        """[batch, length, d_model] -> the same shape; `args` go to the mixer."""
        if self.prenorm:
            return hidden_states + self.dropout(self.mixer(self.norm(hidden_states), *args))
        return self.norm(hidden_states + self.dropout(self.mixer(hidden_states, *args)))


class Layer(nn.Module):
    """One sequence mixer and at most one channel mixer, each in a residual."""

    def __init__(self, config: Any, mixer: Any, layer_idx: int) -> None:
        """config: MixerBertConfig or alike; mixer: this layer's specification."""
        super().__init__()
        width = config.hidden_size
        residual = {"prenorm": config.prenorm, "norm_eps": config.norm_eps, "dropout": config.layer_dropout_prob}
        self.sequence = Residual(build_mixer(mixer, width, layer_idx), width, **residual)
        self.channel = None
        if config.channel_mixer is not None:
            cls, options = channel_mixers.parse(config.channel_mixer, "channel_mixer")
            self.channel = Residual(cls(width, options), width, **residual)

    def forward(self, hidden_states: Tensor, packing: Packing | None) -> Tensor:
        """[batch, length, d_model] -> the same shape."""
        hidden_states = self.sequence(hidden_states, packing)
        return hidden_states if self.channel is None else self.channel(hidden_states)


class Backbone(nn.Module):
    """All layers, and the last norm that a prenorm stack needs."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(config, mixer, i) for i, mixer in enumerate(config.layer_mixers()))
        self.final_norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps) if config.prenorm else None
        # transformers finds these two by name and sets them in gradient_checkpointing_enable().
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Any = None

    def forward(self, hidden_states: Tensor, packing: Packing | None, keep_all: bool = False) -> list[Tensor]:
        """The input and every layer's output if keep_all, else the last output alone; final norm applied."""
        states = []
        for layer in self.layers:
            if keep_all:
                states.append(hidden_states)
            if self.gradient_checkpointing and self.training:
                hidden_states = self._gradient_checkpointing_func(layer, hidden_states, packing)
            else:
                hidden_states = layer(hidden_states, packing)
        if self.final_norm is not None:
            hidden_states = self.final_norm(hidden_states)
        return [*states, hidden_states]
