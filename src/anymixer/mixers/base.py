"""What every sequence mixer is: the base class, and the registry that YAML files choose from."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from anymixer.layers.packing import Packing
from anymixer.layers.param_hints import ParamHint
from anymixer.mixers.plugins import load_plugin
from anymixer.registry import Registry


class SequenceMixer(nn.Module):
    """Mixes tokens of a sequence; written as output(M V), with M a matrix over positions.

    A subclass lists its options in `Config`, takes `(d_model, *, layer_idx=None, **options)` and implements
    `forward`, `matrix`, `values` and `output`, such that for any packing p
    forward(h, p) == output(matrix(h, p) @ values(h, p), h, p).
    """

    causal: ClassVar[bool] = False

    @dataclass(kw_only=True)
    class Config:
        """Options of the mixer, as they stand in a YAML file beside its name."""

        def validate(self, d_model: int, path: str) -> None:
            """Raise UserError, naming `path` and the key, when the options do not fit `d_model`."""

        def longest_row(self) -> int | None:
            """Most positions a row may have, None without a limit."""
            return None

    def forward(self, hidden_states: Tensor, packing: Packing | None = None) -> Tensor:
        """[batch, length, d_model] -> the same shape.

        packing: which tokens are real and which belong together; None means whole rows. What follows a
        sequence, or shares its row, changes nothing in its output. Rows at padding are meaningless but finite.
        """
        raise NotImplementedError

    def matrix(self, hidden_states: Tensor, packing: Packing | None = None) -> Tensor:
        """The mixing matrix M: [batch, groups, length, length], zero between different sequences."""
        raise NotImplementedError

    def values(self, hidden_states: Tensor, packing: Packing | None = None) -> Tensor:
        """What M is applied to, V: [batch, groups, length, width]."""
        raise NotImplementedError

    def output(self, mixed: Tensor, hidden_states: Tensor, packing: Packing | None = None) -> Tensor:
        """From M V ([batch, groups, length, width]) to the mixer's result [batch, length, d_model]."""
        raise NotImplementedError

    def param_hints(self) -> dict[str, ParamHint]:
        """Training hints by relative parameter name: no weight decay, an own learning rate."""
        return {}

    def reset_own_parameters(self) -> None:
        """Draw the parameters that are neither a Linear's nor a norm's anew; models call it per layer."""


mixers: Registry[SequenceMixer] = Registry("mixer", base=SequenceMixer)
register_mixer = mixers.register


def parse_mixer(spec: Mapping[str, Any] | str, d_model: int, path: str = "mixer") -> tuple[type[SequenceMixer], Any]:
    """The mixer class and its validated options; a `module` in `spec` is imported first (see `plugins`).

    Raises UserError naming the key under `path`.
    """
    cls, config = mixers.parse(load_plugin(mixers, spec, path), path)
    config.validate(d_model, path)
    return cls, config


def build_mixer(
    spec: Mapping[str, Any] | str, d_model: int, layer_idx: int | None = None, path: str = "mixer"
) -> SequenceMixer:
    """The module that `spec` (a name, or a mapping with `name` and options) describes."""
    cls, config = parse_mixer(spec, d_model, path)
    return cls(d_model, layer_idx=layer_idx, **vars(config))  # type: ignore[call-arg]
