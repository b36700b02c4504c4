"""What mixing ops do to M V before they return it: a scale for every row, and the values added."""

from torch import Tensor


def number_and_rows(scale: Tensor | float) -> tuple[float, Tensor | None]:
    """A scale as the product of a number and, where it goes by rows, a number for each: [batch, length] or None."""
    return (1.0, scale) if isinstance(scale, Tensor) else (scale, None)


def finish_rows(mixed: Tensor, v: Tensor, scale: Tensor | float, residual: bool) -> Tensor:
    """scale * mixed, and + v with `residual`, in v's dtype.

    mixed, v: [batch, length, nheads, headdim]. scale: a number or [batch, length].
    """
    mixed = mixed * (scale[:, :, None, None].to(v.dtype) if isinstance(scale, Tensor) else scale)
    return mixed + v if residual else mixed
