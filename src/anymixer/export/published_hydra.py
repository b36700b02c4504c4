"""Names and configuration of the published Hydra-BERT checkpoints, as ours."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from anymixer.models.configuration_mixer_bert import MixerBertConfig

_NAMES = (
    (r"bert\.embeddings\.word_embeddings\.(.*)", r"bert.embeddings.word.\1"),
    (r"bert\.embeddings\.token_type_embeddings\.(.*)", r"bert.embeddings.token_type.\1"),
    (r"bert\.embeddings\.position_embeddings\.(.*)", r"bert.embeddings.position.\1"),
    (r"bert\.embeddings\.LayerNorm\.(.*)", r"bert.embeddings.norm.\1"),
    (r"bert\.encoder\.layer\.(\d+)\.layer\.(mixer|norm)\.(.*)", r"bert.backbone.layers.\1.sequence.\2.\3"),
    (r"bert\.encoder\.norm_f\.(.*)", r"bert.backbone.final_norm.\1"),
    (r"cls\.predictions\.transform\.dense\.(.*)", r"head.dense.\1"),
    (r"cls\.predictions\.transform\.LayerNorm\.(.*)", r"head.norm.\1"),
    (r"cls\.predictions\.decoder\.(.*)", r"head.decoder.\1"),
)


def convert_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published parameter names -> ours. The tied decoder matrix is filled in where the file leaves it out.

    Raises KeyError for a name that the published models do not have.
    """
    converted = {_convert_name(name): value for name, value in state.items()}
    converted.setdefault("head.decoder.weight", converted["bert.embeddings.word.weight"])
    return converted


def _convert_name(name: str) -> str:
    for pattern, replacement in _NAMES:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, replacement, name)
    raise KeyError(f"not a parameter of a published Hydra-BERT: {name}")


def convert_config(published: Mapping[str, Any]) -> MixerBertConfig:
    """The configuration of a published Hydra-BERT as ours; missing fields take the published defaults."""
    if published.get("matrix_mixer_type", "hydra") != "hydra":
        raise ValueError(f"only hydra checkpoints convert, not {published['matrix_mixer_type']}")
    options = ("d_conv", "expand", "d_state", "headdim", "chunk_size")
    mixer = {"name": "hydra", **{key: published[key] for key in options if key in published}}
    same = ("vocab_size", "hidden_size", "num_hidden_layers", "type_vocab_size", "max_position_embeddings")
    return MixerBertConfig(
        mixer=mixer,
        prenorm=published.get("is_prenorm", False),
        position_embeddings="learned" if published.get("use_position_embeddings") else "none",
        **{key: published[key] for key in same if key in published},
    )
