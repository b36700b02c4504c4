"""Any causal mixer made bidirectional by running it both ways, which is what Hydra is compared with (arXiv 2407.09941,
Table 3)."""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from anymixer.errors import UserError
from anymixer.layers.packing import Packing
from anymixer.layers.param_hints import ParamHint
from anymixer.mixers.base import SequenceMixer, as_causal, build_mixer, register_mixer


@register_mixer("bidirectional")
class Bidirectional(SequenceMixer):
    """A causal mixer over the tokens and over their reverse; the two results are added, multiplied or projected."""

    @dataclass(kw_only=True)
    class Config(SequenceMixer.Config):
        """mixer: name and options of the causal mixer. combine: how the directions come together. share: whether one
        set of weights serves both."""

        mixer: Any = "ssd"
        combine: Literal["add", "mult", "concat"] = "add"
        share: bool = True

        def validate(self, d_model: int, path: str) -> None:
            if isinstance(self.mixer, dict) and self.mixer.get("name") == "bidirectional":
                raise UserError(f"{path}.mixer.name: a bidirectional mixer cannot be made bidirectional")
            as_causal(self.mixer, d_model, f"{path}.mixer")

    def __init__(self, d_model: int, *, layer_idx: int | None = None, **options: Any) -> None:
        """d_model: width in and out; options: the fields of `Config`."""
        super().__init__()
        config = self.Config(**options)
        config.validate(d_model, type(self).__name__)
        self.config = config
        spec = as_causal(config.mixer, d_model)
        self.mixers = nn.ModuleList(build_mixer(spec, d_model, layer_idx) for _ in range(1 if config.share else 2))
        if config.combine == "concat":
            self.out_proj = nn.Linear(2 * d_model, d_model, bias=False)

    @classmethod
    def share_between_layers(cls, mixers: list[Any], d_model: int) -> nn.Module | None:
        """What the causal mixers of each class share over the layers, for each direction that has its own."""
        shared = nn.ModuleDict()
        for direction in range(max(len(mixer.mixers) for mixer in mixers)):
            inner = [mixer.mixers[direction] for mixer in mixers if direction < len(mixer.mixers)]
            for kind in dict.fromkeys(type(mixer) for mixer in inner):
                module = kind.share_between_layers([mixer for mixer in inner if type(mixer) is kind], d_model)
                if module is not None:
                    shared[f"{kind.__name__.lower()}_{direction}"] = module
        return shared or None

    def reset_own_parameters(self) -> None:
        """The causal mixers reset themselves."""

    def param_hints(self) -> dict[str, ParamHint]:
        """The causal mixers'."""
        return {
            f"mixers.{i}.{name}": hint
            for i, mixer in enumerate(self.mixers)
            for name, hint in mixer.param_hints().items()  # type: ignore[operator]
        }

    def _directions(self) -> tuple[Any, Any]:
        return self.mixers[0], self.mixers[-1]

    def _combine(self, forward: Tensor, backward: Tensor) -> Tensor:
        if self.config.combine == "add":
            return forward + backward
        if self.config.combine == "mult":
            return forward * backward
        return self.out_proj(torch.cat([forward, backward], dim=-1))

    def forward(self, hidden_states: Tensor, packing: Packing | None = None) -> Tensor:
        """[batch, length, d_model] -> the same shape; see `SequenceMixer.forward`."""
        ahead, back = self._directions()
        backward = back(hidden_states.flip(1), _flipped(packing)).flip(1)
        return self._combine(ahead(hidden_states, packing), backward)

    def matrix(self, hidden_states: Tensor, packing: Packing | None = None) -> Tensor:
        """Both directions' matrices, one after the other: [batch, 2 groups, length, length]."""
        ahead, back = self._directions()
        backward = back.matrix(hidden_states.flip(1), _flipped(packing)).flip(-2, -1)
        return torch.cat([ahead.matrix(hidden_states, packing), backward], dim=1)

    def values(self, hidden_states: Tensor, packing: Packing | None = None) -> Tensor:
        """Both directions' values: [batch, 2 groups, length, width]."""
        ahead, back = self._directions()
        backward = back.values(hidden_states.flip(1), _flipped(packing)).flip(-2)
        return torch.cat([ahead.values(hidden_states, packing), backward], dim=1)

    def output(self, mixed: Tensor, hidden_states: Tensor, packing: Packing | None = None) -> Tensor:
        """What follows, of [batch, 2 groups, length, width]."""
        ahead, back = self._directions()
        first, second = mixed.chunk(2, dim=1)
        backward = back.output(second.flip(-2), hidden_states.flip(1), _flipped(packing)).flip(1)
        return self._combine(ahead.output(first, hidden_states, packing), backward)


def _flipped(packing: Packing | None) -> Packing | None:
    return None if packing is None else Packing(packing.sequence_id.flip(1), packing.packed)
