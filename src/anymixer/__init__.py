"""Anymixer: pretrain, fine-tune, compare and ship language models whose sequence mixer is a choice.

    from anymixer import Hydra
    block = Hydra(d_model=256, d_state=64, d_conv=7, expand=2)

Names load on first use, so that checking a YAML file does not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anymixer.layers.cdmoe import CDMoE
    from anymixer.mixers.attention import Attention
    from anymixer.mixers.dmattn import DMAttn
    from anymixer.mixers.hgrn2 import HGRN2
    from anymixer.mixers.hydra import Hydra
    from anymixer.mixers.matrix_mixer import MatrixMixer
    from anymixer.mixers.s4_block import S4Block
    from anymixer.mixers.s4d import S4D
    from anymixer.models.doge import CheemsConfig, CheemsForCausalLM, DogeConfig, DogeForCausalLM

__version__ = "0.1.0"

_LAZY = {
    "Attention": "anymixer.mixers.attention",
    "CDMoE": "anymixer.layers.cdmoe",
    "CheemsConfig": "anymixer.models.doge",
    "CheemsForCausalLM": "anymixer.models.doge",
    "DMAttn": "anymixer.mixers.dmattn",
    "DogeConfig": "anymixer.models.doge",
    "DogeForCausalLM": "anymixer.models.doge",
    "HGRN2": "anymixer.mixers.hgrn2",
    "Hydra": "anymixer.mixers.hydra",
    "MatrixMixer": "anymixer.mixers.matrix_mixer",
    "S4Block": "anymixer.mixers.s4_block",
    "S4D": "anymixer.mixers.s4d",
}

__all__ = [
    "HGRN2",
    "S4D",
    "Attention",
    "CDMoE",
    "CheemsConfig",
    "CheemsForCausalLM",
    "DMAttn",
    "DogeConfig",
    "DogeForCausalLM",
    "Hydra",
    "MatrixMixer",
    "S4Block",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
