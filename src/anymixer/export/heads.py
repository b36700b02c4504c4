"""Which model classes an exported folder offers, and under which of transformers' names."""

import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class Family:
    """Model classes with one configuration, each as "module.Class" of `anymixer.models`.

    heads: transformers' AutoModel... name -> class.
    """

    configuration: str
    heads: dict[str, str]

    def modules(self) -> list[str]:
        """The modules that hold the classes, with the configuration's first."""
        names = [self.configuration, *self.heads.values()]
        return list(dict.fromkeys(f"anymixer.models.{name.partition('.')[0]}" for name in names))

    def auto_map(self) -> dict[str, str]:
        """What a `config.json` says of the code beside it, which has all heads in the first one's file."""
        home = next(iter(self.heads.values())).partition(".")[0]
        heads = {auto: f"{home}.{name.partition('.')[2]}" for auto, name in self.heads.items()}
        return {"AutoConfig": self.configuration, **heads}


# By the configuration's model_type.
FAMILIES = {
    "mixer_bert": Family(
        "configuration_mixer_bert.MixerBertConfig",
        {
            "AutoModel": "modeling_mixer_bert.MixerBertModel",
            "AutoModelForMaskedLM": "modeling_mixer_bert.MixerBertForMaskedLM",
            "AutoModelForSequenceClassification": "sequence_classification.MixerBertForSequenceClassification",
            "AutoModelForTokenClassification": "token_classification.MixerBertForTokenClassification",
            "AutoModelForQuestionAnswering": "question_answering.MixerBertForQuestionAnswering",
        },
    ),
    "mixer_lm": Family(
        "configuration_mixer_lm.MixerLMConfig",
        {
            "AutoModel": "modeling_mixer_lm.MixerLMModel",
            "AutoModelForCausalLM": "modeling_mixer_lm.MixerLMForCausalLM",
        },
    ),
}
# transformers' own models that a run can train: they are exported without code.
_HF_HEADS = {
    "bert": {
        "AutoModelForMaskedLM": "BertForMaskedLM",
        "AutoModelForSequenceClassification": "BertForSequenceClassification",
    }
}


def load_class(name: str) -> Any:
    """The class that "module.Class" of `anymixer.models` names."""
    module, _, cls = name.partition(".")
    return getattr(importlib.import_module(f"anymixer.models.{module}"), cls)


def config_class(model_type: str) -> "type[PretrainedConfig] | None":
    """The configuration class of a model type that a run of ours can have trained, else None."""
    import transformers

    if model_type in FAMILIES:
        return load_class(FAMILIES[model_type].configuration)
    return type(transformers.AutoConfig.for_model(model_type)) if model_type in _HF_HEADS else None


def model_classes(model_type: str) -> "dict[str, type[PreTrainedModel]]":
    """transformers' AutoModel... name -> model class."""
    import transformers

    if model_type in FAMILIES:
        return {auto: load_class(name) for auto, name in FAMILIES[model_type].heads.items()}
    return {auto: getattr(transformers, name) for auto, name in _HF_HEADS[model_type].items()}
