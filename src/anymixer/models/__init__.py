"""Models: one backbone over any mixer, as Hugging Face models; names load lazily to keep config checks light."""

import importlib
from typing import TYPE_CHECKING, Any

from anymixer.models.model_config import ModelConfig, build_model

if TYPE_CHECKING:
    from anymixer.models.configuration_mixer_bert import MixerBertConfig
    from anymixer.models.modeling_mixer_bert import MixerBertForMaskedLM, MixerBertModel

_LAZY = {
    "MixerBertConfig": "anymixer.models.configuration_mixer_bert",
    "MixerBertModel": "anymixer.models.modeling_mixer_bert",
    "MixerBertForMaskedLM": "anymixer.models.modeling_mixer_bert",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["MixerBertConfig", "MixerBertForMaskedLM", "MixerBertModel", "ModelConfig", "build_model"]
