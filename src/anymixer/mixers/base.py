"""What every sequence mixer is: the base class, and the registry that YAML files choose from."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from anymixer.errors import UserError
from anymixer.layers.packing import Packing
from anymixer.layers.param_hints import ParamHint
from anymixer.mixers.plugins import load_plugin
from anymixer.registry import Registry

State = dict[str, Tensor]


def keep_where(real: Tensor, new: State, old: State) -> State:
    """`new` in the rows where `real` [batch] is true, `old` in the others."""
    return {
        name: torch.where(real.view(-1, *[1] * (tensor.dim() - 1)), tensor, old[name]) for name, tensor in new.items()
    }


def state_bytes(state: State) -> int:
    """Bytes that all tensors of a state hold."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


class SequenceMixer(nn.Module):
    """Mixes tokens of a sequence; written as output(M V), with M a matrix over positions.

    A subclass lists its options in `Config`, takes `(d_model, *, layer_idx=None, **options)` and implements
    `forward`, `matrix`, `values` and `output`, such that for any packing p
    forward(h, p) == output(matrix(h, p) @ values(h, p), h, p).

    projects_first: whether linear layers alone read what comes in, so that under autocast its narrow type is enough.
    """

    projects_first: ClassVar[bool] = False

    @dataclass(kw_only=True)
    class Config:
        """Options of the mixer, as they stand in a YAML file beside its name.

        ALWAYS_CAUSAL: True for a mixer without a form that sees later tokens. One with both has a field `causal`.
        """

        ALWAYS_CAUSAL: ClassVar[bool] = False

        def validate(self, d_model: int, path: str) -> None:
            """Raise UserError, naming `path` and the key, when the options do not fit `d_model`."""

        def longest_row(self) -> int | None:
            """Most positions a row may have, None without a limit."""
            return None

        def is_causal(self) -> bool:
            """Whether, with these options, no token sees a later one."""
            return self.ALWAYS_CAUSAL or getattr(self, "causal", False)

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

    def init_state(
        self, batch: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> State:
        """What a causal mixer knows before the first token: tensors whose first axis is the batch."""
        raise NotImplementedError(f"{type(self).__name__} is not causal, so it has no state")

    def step(self, hidden_states: Tensor, state: State) -> tuple[Tensor, State]:
        """One token of each row: ([batch, d_model], state) -> the same shapes; what `forward` gives at that place.

        The state that is passed in is left as it is.
        """
        raise NotImplementedError(f"{type(self).__name__} is not causal, so it cannot step")

    def prefill(self, hidden_states: Tensor, packing: Packing | None = None) -> tuple[Tensor, State]:
        """`forward`, and the state after the last token of each row.

        packing: rows of at most one sequence each, which may be padded on the left; padding leaves no trace.
        A mixer that can do better than token by token overrides this.
        """
        state = self.init_state(hidden_states.shape[0], hidden_states.device, hidden_states.dtype)
        outputs = []
        for place in range(hidden_states.shape[1]):
            output, after = self.step(hidden_states[:, place], state)
            state = after if packing is None else keep_where(packing.real[:, place], after, state)
            outputs.append(output)
        return torch.stack(outputs, dim=1), state

    def state_size(self, length: int, dtype: torch.dtype = torch.float32) -> int:
        """Bytes of one row's state after `length` tokens, parameters and inputs being of `dtype`."""
        raise NotImplementedError(f"{type(self).__name__} is not causal, so it has no state")

    @classmethod
    def share_between_layers(cls, mixers: list[Any], d_model: int) -> nn.Module | None:
        """Called by a model with all its mixers of this class, first layer first: a module of parameters that they
        share, for the model to hold, or None."""
        return None

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


def as_causal(spec: Mapping[str, Any] | str, d_model: int, path: str = "mixer") -> dict[str, Any]:
    """`spec` as a language model needs it: a mixer with both forms gets `causal: true` unless it says otherwise.

    Raises UserError, naming the key, for a mixer that sees later tokens.
    """
    cls, _ = parse_mixer(spec, d_model, path)
    full: dict[str, Any] = {"name": spec} if isinstance(spec, str) else dict(spec)
    if "causal" in {f.name for f in fields(cls.Config)}:
        full.setdefault("causal", True)
    if not parse_mixer(full, d_model, path)[1].is_causal():
        key = f"{path}.causal: false" if "causal" in full else f"{path}.name: '{full['name']}'"
        raise UserError(
            f"{key} lets tokens see later ones; a causal_lm needs a causal mixer (`anymixer mixers` lists them)"
        )
    return full
