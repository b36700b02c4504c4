"""The one backbone: residual layers of a sequence mixer and, where asked for, a channel mixer."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from anymixer_kernels.add_norm import add_norm, add_norm_and_copy
from torch import Tensor, nn

from anymixer.layers.channel_mixers import channel_mixers
from anymixer.layers.packing import Packing
from anymixer.mixers import SequenceMixer, build_mixer
from anymixer.mixers.base import State


def cycled(choice: Any, layers: int) -> list[Any]:
    """What each layer gets of a configuration's one choice for all, or list of choices to cycle through."""
    cycle = choice if isinstance(choice, (list, tuple)) else [choice]
    return [cycle[i % len(cycle)] for i in range(layers)]


@dataclass(frozen=True, kw_only=True)
class ResidualOptions:
    """How a mixer is put into a residual.

    prenorm: normalise before the mixer, not after the sum. dropout: of the mixer's output. weights: multiply the
    residual branch by a learned number per channel, 1 at first (arXiv 2412.11834).
    """

    prenorm: bool = False
    norm: Literal["layer_norm", "rms_norm"] = "layer_norm"
    norm_eps: float = 1e-5
    dropout: float = 0.0
    weights: bool = False

    def make_norm(self, width: int) -> nn.Module:
        """The norm that the options name."""
        cls = nn.LayerNorm if self.norm == "layer_norm" else nn.RMSNorm
        return cls(width, eps=self.norm_eps)


class Residual(nn.Module):
    """hidden + dropout(mixer(hidden)), normalised after the sum, or before the mixer (prenorm)."""

    def __init__(self, mixer: nn.Module, d_model: int, options: ResidualOptions) -> None:
        super().__init__()
        self.mixer = mixer
        self.norm = options.make_norm(d_model)
        self.dropout = nn.Dropout(options.dropout)
        self.prenorm = options.prenorm
        # Set by the training algorithm of that name: what the norm returns has autocast's dtype, if there is one.
        self.low_precision = False
        # Set by the backbone: whether what follows reads the result in autocast's dtype alone (`projects_first`).
        self.feeds_projection = False
        self.weight = nn.Parameter(torch.ones(d_model)) if options.weights else None

    def forward(self, hidden_states: Tensor, copy: Tensor | None, *args: Any) -> tuple[Tensor, Tensor | None]:
        """[batch, length, d_model] -> the same shape, each with a copy in autocast's dtype where there is one, for
        products that would cast it; `args` go to the mixer."""
        return self.around(hidden_states, copy, lambda inner: self.mixer(inner, *args))

    def around(
        self, hidden_states: Tensor, copy: Tensor | None, mix: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor | None]:
        """`forward` with `mix` in the mixer's place."""
        inner = hidden_states
        if self.prenorm:
            inner = self.norm(hidden_states)
        elif copy is not None and getattr(self.mixer, "projects_first", False):
            inner = copy
        mixed = self.dropout(mix(inner))
        kept = hidden_states if self.weight is None else self.weight * hidden_states
        if self.prenorm:
            return kept + mixed, None
        if not isinstance(self.norm, nn.LayerNorm):
            return self.norm(kept + mixed), None
        norm = self.norm.weight, self.norm.bias, self.norm.eps
        dtype = _autocast_dtype(kept)
        # Autocast narrows float32 alone.
        if self.feeds_projection and not self.low_precision and kept.dtype == torch.float32 != dtype:
            return add_norm_and_copy(kept, mixed, *norm, copy_dtype=dtype)
        return add_norm(kept, mixed, *norm, dtype=dtype if self.low_precision else kept.dtype), None


class Layer(nn.Module):
    """One sequence mixer and at most one channel mixer, each in a residual."""

    def __init__(self, config: Any, mixer: Any, channel_mixer: Any, layer_idx: int) -> None:
        """config: MixerBertConfig or alike; mixer, channel_mixer: this layer's specifications."""
        super().__init__()
        width, options = config.hidden_size, config.residual_options()
        self.sequence = Residual(build_mixer(mixer, width, layer_idx), width, options)
        self.channel = None
        if channel_mixer is not None:
            cls, channel_options = channel_mixers.parse(channel_mixer, "channel_mixer")
            self.channel = Residual(cls(width, channel_options), width, options)

    def forward(
        self, hidden_states: Tensor, packing: Packing | None, copy: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[batch, length, d_model] -> the same shape; copies as in `Residual`."""
        return self._then_channels(*self.sequence(hidden_states, copy, packing))

    def residuals(self) -> list[Residual]:
        """In the order in which they come."""
        return [self.sequence] if self.channel is None else [self.sequence, self.channel]

    def mixing_matrix(self, hidden_states: Tensor, packing: Packing | None) -> Tensor:
        """The sequence mixer's matrix for this layer's input: [batch, groups, length, length]."""
        inner = self.sequence.norm(hidden_states) if self.sequence.prenorm else hidden_states
        return self.sequence.mixer.matrix(inner, packing)  # type: ignore[operator]

    def prefill(self, hidden_states: Tensor, packing: Packing | None) -> tuple[Tensor, State]:
        """`forward`, and the mixer's state after the last token of each row."""
        return self._with_state(hidden_states, lambda mixer, inner: mixer.prefill(inner, packing))

    def step(self, hidden_states: Tensor, state: State) -> tuple[Tensor, State]:
        """One token of each row, [batch, 1, d_model], and the mixer's state before and after it."""

        def mix(mixer: SequenceMixer, inner: Tensor) -> tuple[Tensor, State]:
            output, after = mixer.step(inner[:, 0], state)
            return output[:, None], after

        return self._with_state(hidden_states, mix)

    def _with_state(
        self, hidden_states: Tensor, mix: Callable[[Any, Tensor], tuple[Tensor, State]]
    ) -> tuple[Tensor, State]:
        states: list[State] = []

        def output_of(inner: Tensor) -> Tensor:
            output, state = mix(self.sequence.mixer, inner)
            states.append(state)
            return output

        return self._then_channels(*self.sequence.around(hidden_states, None, output_of))[0], states[0]

    def _then_channels(self, hidden_states: Tensor, copy: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return (hidden_states, copy) if self.channel is None else self.channel(hidden_states, copy)


class Backbone(nn.Module):
    """All layers, and the last norm that a prenorm stack needs."""

    def __init__(self, config: Any, mixers: Sequence[Any]) -> None:
        """mixers: the specification of each layer's."""
        super().__init__()
        channels = cycled(config.channel_mixer, len(mixers))
        self.layers = nn.ModuleList(Layer(config, *pair, i) for i, pair in enumerate(zip(mixers, channels)))
        residuals = [residual for layer in self.layers for residual in layer.residuals()]  # type: ignore[operator]
        for residual, following in itertools.pairwise(residuals):
            residual.feeds_projection = getattr(following.mixer, "projects_first", False)
        self.shared = nn.ModuleDict(_shared(self.layers, config.hidden_size))
        options = config.residual_options()
        self.final_norm = options.make_norm(config.hidden_size) if options.prenorm else None
        # transformers finds these two by name and sets them in gradient_checkpointing_enable().
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Any = None

    def forward(self, hidden_states: Tensor, packing: Packing | None, keep_all: bool = False) -> list[Tensor]:
        """The input and every layer's output if keep_all, else the last output alone; final norm applied."""
        states, copy = [], None
        for layer in self.layers:
            if keep_all:
                states.append(hidden_states)
            if self.gradient_checkpointing and self.training:
                hidden_states, copy = self._gradient_checkpointing_func(layer, hidden_states, packing, copy)
            else:
                hidden_states, copy = layer(hidden_states, packing, copy)
        return [*states, self._normalised(hidden_states)]

    def prefill(self, hidden_states: Tensor, packing: Packing | None) -> tuple[Tensor, list[State]]:
        """The last output, and every layer's state after the last token of each row."""
        states = []
        for layer in self.layers:
            hidden_states, state = layer.prefill(hidden_states, packing)  # type: ignore[operator]
            states.append(state)
        return self._normalised(hidden_states), states

    def step(self, hidden_states: Tensor, states: Sequence[State]) -> tuple[Tensor, list[State]]:
        """One token of each row, [batch, 1, d_model], given and returning every layer's state."""
        after = []
        for layer, state in zip(self.layers, states):
            hidden_states, state = layer.step(hidden_states, state)  # type: ignore[operator]
            after.append(state)
        return self._normalised(hidden_states), after

    def _normalised(self, hidden_states: Tensor) -> Tensor:
        return hidden_states if self.final_norm is None else self.final_norm(hidden_states)


def _autocast_dtype(tensor: Tensor) -> torch.dtype:
    kind = tensor.device.type
    if kind == "meta":  # which torch refuses to answer for
        return tensor.dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else tensor.dtype


def _shared(layers: nn.ModuleList, d_model: int) -> dict[str, nn.Module]:
    """What the mixers of each class share over the layers, by the class's name in lower case."""
    mixers: list[Any] = [layer.sequence.mixer for layer in layers]  # type: ignore[union-attr]
    classes = dict.fromkeys(type(mixer) for mixer in mixers)
    shared = {
        cls.__name__.lower(): cls.share_between_layers([m for m in mixers if type(m) is cls], d_model)
        for cls in classes
    }
    return {name: module for name, module in shared.items() if module is not None}
