"""What a language model's layers know of the tokens so far, as transformers' generation hands it on."""

from torch import Tensor
from transformers import Cache

from anymixer.mixers.base import State


class MixerCache(Cache):
    """The states of all layers, under the method names that transformers' generation calls.

    states: each layer's. lengths: real tokens of each row, int64 [batch]. seen: positions of a row, with padding.
    """

    # Of transformers' own nothing is kept, for that is one key and value a token and layer.
    is_compileable = False

    def __init__(self, states: list[State], lengths: Tensor, seen: int) -> None:
        self.states, self.lengths, self.seen = states, lengths, seen

    def __len__(self) -> int:
        """Number of layers."""
        return len(self.states)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} layers, {self.seen} positions, {self.num_bytes()} bytes)"

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Positions read so far."""
        return self.seen

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Continue row i from what was row beam_idx[i]; there may be more rows than before."""
        self.states = [{name: t.index_select(0, beam_idx) for name, t in state.items()} for state in self.states]
        self.lengths = self.lengths.index_select(0, beam_idx)

    def num_bytes(self) -> int:
        """Memory that the states take."""
        return sum(t.numel() * t.element_size() for state in self.states for t in state.values())
