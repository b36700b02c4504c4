"""What mixing ops do to M V before they return it: a scale for every row, and the values added."""

from torch import Tensor


def finish_rows(mixed: Tensor, v: Tensor, scale: Tensor | float, residual: bool) -> Tensor:
    """scale * mixed, and + v with `residual`, in v's dtype.

    mixed, v: [batch, length, nheads, headdim]. scale: a number or [batch, length].
    """
    mixed = mixed * (scale[:, :, None, None].to(v.dtype) if isinstance(scale, Tensor) else scale)
    return mixed + v if residual else mixed
