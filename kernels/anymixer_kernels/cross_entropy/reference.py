"""The cross entropy, spelled out."""

import torch
from torch import Tensor

from anymixer_kernels.blockwise import wide


def cross_entropy_reference(logits: Tensor, targets: Tensor) -> Tensor:
    """log(sum over classes of exp(logit)) - logit of the target; arguments as in `cross_entropy`."""
    logits = wide(logits)
    chosen = logits.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return torch.where(targets >= 0, logits.logsumexp(1) - chosen, 0.0)
