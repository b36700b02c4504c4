"""The values that a new model's parameters have."""

import torch
from torch import nn

from anymixer.layers.channel_mixer_base import ChannelMixer
from anymixer.layers.norm import GatedRMSNorm
from anymixer.mixers.base import SequenceMixer
from anymixer.models.backbone import Residual


def initialize(module: nn.Module, std: float) -> None:
    """Give a module, without its children, new values: projections and embeddings N(0, std), norms and residual weights
    1 and 0, and what a sequence or channel mixer calls its own by its `reset_own_parameters`. Covers every module that
    both models have, so that no transformers version adds rules of its own."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, mean=0.0, std=std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, mean=0.0, std=std)
        if module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx].zero_()
    elif isinstance(module, nn.LayerNorm):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, (nn.RMSNorm, GatedRMSNorm, Residual)) and module.weight is not None:
        nn.init.ones_(module.weight)
    elif isinstance(module, (SequenceMixer, ChannelMixer)):
        module.reset_own_parameters()
