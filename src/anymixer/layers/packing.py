"""Which positions of a [batch, length] grid are real tokens, and which of them belong together."""

from dataclasses import dataclass
from functools import cached_property

import torch
from anymixer_kernels.sequences import places
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """The sequences of a batch.

    sequence_id: [batch, length] integers; equal neighbours in a row are one sequence, -1 is padding. The tokens
    of a sequence are contiguous. packed: False promises at most one sequence a row, which is cheaper to honour.
    """

    sequence_id: Tensor
    packed: bool

    @property
    def real(self) -> Tensor:
        """bool [batch, length]: True at real tokens."""
        return self.sequence_id >= 0

    def positions(self) -> Tensor:
        """int64 [batch, length]: each token's place in its own sequence, from 0."""
        return places(self.sequence_id)

    def lengths(self) -> Tensor:
        """int64 [batch, length]: how many tokens each token's own sequence has; at padding at least 1."""
        if not self.packed:
            return self.real.sum(1, keepdim=True).clamp(min=1).expand_as(self.sequence_id)
        ids = self.sequence_id
        ends = places(ids.flip(1)).flip(1)
        return self.positions() + ends + 1

    @cached_property
    def runs(self) -> tuple[Tensor, int]:
        """Where each run of equal ids begins among the batch's tokens, row after row, int64 [runs + 1] with their
        number at the end, and the longest run's length. The host waits for the device, once a batch."""
        ids = self.sequence_id
        begins = torch.ones_like(ids, dtype=torch.bool)
        begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
        offsets = torch.cat([begins.flatten().nonzero()[:, 0], torch.full_like(ids[0, :1], ids.numel())])
        return offsets, int(offsets.diff().max())

    def visible_keys(self) -> Tensor:
        """Which keys a query of softmax attention may see: bool [batch, 1, 1 or length, length].

        No row is empty, so no softmax is NaN: padding sees padding (packed), or everything when a row is nothing
        but padding.
        """
        if self.packed:
            ids = self.sequence_id
            return (ids[:, :, None] == ids[:, None, :])[:, None]
        return (self.real | ~self.real.any(dim=1, keepdim=True))[:, None, None, :]


def make_packing(attention_mask: Tensor | None, sequence_id: Tensor | None) -> Packing | None:
    """The packing of a batch, or None when every row is one whole sequence.

    attention_mask: [batch, length], nonzero at real tokens. sequence_id: [batch, length], -1 at padding.
    Both given: a token is real where both say so.
    """
    if sequence_id is not None:
        if attention_mask is not None:
            sequence_id = torch.where(attention_mask.bool(), sequence_id, -1)
        return Packing(sequence_id, packed=True)
    if attention_mask is not None:
        return Packing(attention_mask.bool().long() - 1, packed=False)
    return None
