"""Our own models' names and configurations, as an exported folder or a run's checkpoint holds them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from anymixer.models.configuration_mixer_bert import MixerBertConfig
    from anymixer.models.configuration_mixer_lm import MixerLMConfig


def convert_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights as they are."""
    return dict(state)


def convert_config(saved: Mapping[str, Any]) -> "MixerBertConfig | MixerLMConfig":
    """The configuration that the fields of a config.json are of. Raises ValueError for another model's."""
    from anymixer.models.configuration_mixer_bert import MixerBertConfig
    from anymixer.models.configuration_mixer_lm import MixerLMConfig

    classes = {cls.model_type: cls for cls in (MixerBertConfig, MixerLMConfig)}
    kind = saved.get("model_type")
    if kind not in classes:
        raise ValueError(f"its configuration is of model_type {kind}, not {' or '.join(classes)}")
    made = classes[kind](**{key: value for key, value in saved.items() if key != "model_type"})
    made.auto_map = None  # of an export
    return made
