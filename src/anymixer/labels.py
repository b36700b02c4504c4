"""The label of a token that is not predicted, and where the others stand."""

from torch import Tensor

# What transformers, Composer and torch's cross_entropy ignore by default.
IGNORED_LABEL = -100


def labelled_positions(labels: Tensor) -> Tensor:
    """Where something is to be predicted, among all positions of a batch: [number]. Waits for the device."""
    return (labels.flatten() != IGNORED_LABEL).nonzero()[:, 0]


def labelled_alone(hidden_states: Tensor, labels: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The hidden states [number, width] and labels [number] of what is to be predicted.

    hidden_states: [batch, length, width]; labels: [batch, length]; positions: `labelled_positions(labels)`, if they are
    known. Raises ValueError for labels of another shape.
    """
    if labels.shape != hidden_states.shape[:-1]:
        raise ValueError(f"labels of shape {tuple(labels.shape)} for tokens of shape {tuple(hidden_states.shape[:-1])}")
    positions = labelled_positions(labels) if positions is None else positions
    return hidden_states.flatten(0, 1).index_select(0, positions), labels.flatten().index_select(0, positions)
