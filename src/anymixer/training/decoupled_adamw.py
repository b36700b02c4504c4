"""Composer's DecoupledAdamW (arXiv 1711.05101) on torch's own AdamW, whose update is one launch on a GPU.

Composer's steps through the parameters one by one in Python.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import AdamW


class DecoupledAdamW(AdamW):
    """AdamW whose weight decay follows the schedule but not the learning rate: a step takes weight_decay lr / lr_0 off
    the weights, lr_0 being the group's first learning rate. AdamW takes weight_decay lr: so its own is weight_decay /
    lr_0."""

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[Mapping[str, Any]],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 1e-5,
        amsgrad: bool = False,
        fused: bool | None = None,
    ) -> None:
        """params: parameters or groups, which may have an lr and a weight_decay of their own; fused: as in AdamW."""
        groups: list[dict[str, Any]] = [
            dict(group) if isinstance(group, Mapping) else {"params": [group]} for group in params
        ]
        for group in groups:
            group["weight_decay"] = group.get("weight_decay", weight_decay) / group.get("lr", lr)
        super().__init__(groups, lr=lr, betas=betas, eps=eps, weight_decay=0.0, amsgrad=amsgrad, fused=fused)
