"""Models: one backbone over any mixer, as Hugging Face models; names load lazily to keep config checks light."""

import importlib
from typing import TYPE_CHECKING, Any

from anymixer.models.model_config import ModelConfig, build_classifier, build_model

if TYPE_CHECKING:
    from anymixer.models.configuration_mixer_bert import MixerBertConfig
    from anymixer.models.configuration_mixer_lm import MixerLMConfig
    from anymixer.models.modeling_mixer_bert import MixerBertForMaskedLM, MixerBertModel
    from anymixer.models.modeling_mixer_lm import MixerLMForCausalLM, MixerLMModel
    from anymixer.models.question_answering import MixerBertForQuestionAnswering
    from anymixer.models.sequence_classification import MixerBertForSequenceClassification
    from anymixer.models.token_classification import MixerBertForTokenClassification

_LAZY = {
    "MixerBertConfig": "anymixer.models.configuration_mixer_bert",
    "MixerBertModel": "anymixer.models.modeling_mixer_bert",
    "MixerBertForMaskedLM": "anymixer.models.modeling_mixer_bert",
    "MixerLMConfig": "anymixer.models.configuration_mixer_lm",
    "MixerLMForCausalLM": "anymixer.models.modeling_mixer_lm",
    "MixerLMModel": "anymixer.models.modeling_mixer_lm",
    "MixerBertForQuestionAnswering": "anymixer.models.question_answering",
    "MixerBertForSequenceClassification": "anymixer.models.sequence_classification",
    "MixerBertForTokenClassification": "anymixer.models.token_classification",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "MixerBertConfig",
    "MixerBertForMaskedLM",
    "MixerBertForQuestionAnswering",
    "MixerBertForSequenceClassification",
    "MixerBertForTokenClassification",
    "MixerBertModel",
    "MixerLMConfig",
    "MixerLMForCausalLM",
    "MixerLMModel",
    "ModelConfig",
    "build_classifier",
    "build_model",
]
