"""Anymixer: pretrain, fine-tune, compare and ship language models whose sequence mixer is a choice.

    from anymixer import Hydra
    block = Hydra(d_model=256, d_state=64, d_conv=7, expand=2)

Names load on first use, so that checking a YAML file does not wait for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anymixer.mixers.attention import Attention
    from anymixer.mixers.hydra import Hydra
    from anymixer.mixers.matrix_mixer import MatrixMixer

__version__ = "0.1.0"

_LAZY = {
    "Attention": "anymixer.mixers.attention",
    "Hydra": "anymixer.mixers.hydra",
    "MatrixMixer": "anymixer.mixers.matrix_mixer",
}

__all__ = ["Attention", "Hydra", "MatrixMixer", "__version__"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
