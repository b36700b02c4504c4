"""Names and configuration of the published Hydra-BERT checkpoints, as ours."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from anymixer.checkpoints.renaming import rename
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
# Buffers that some versions save.
_LEFT_OUT = re.compile(r"bert\.embeddings\.(position_ids|token_type_ids)")


def convert_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Published parameter names -> ours. The tied decoder matrix is filled in where the file leaves it out.

    Raises UnknownNames, a KeyError, for names that the published models do not have.
    """
    kept = {name: value for name, value in state.items() if not _LEFT_OUT.fullmatch(name)}
    converted = rename(kept, _NAMES, "a published Hydra-BERT")
    if "bert.embeddings.word.weight" in converted:
        converted.setdefault("head.decoder.weight", converted["bert.embeddings.word.weight"])
    return converted


def infer_config(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The published configuration that the shapes of a Hydra-BERT's weights (published names) are of.

    The published file holds weights alone. Taken as published: one group, and what leaves no trace in a shape.
    Raises ValueError where the weights that say so are missing.
    """
    first = "bert.encoder.layer.0.layer.mixer."
    names = ("conv1d.weight", "dt_bias", "out_proj.weight")
    missing = [name for name in (f"{first}{n}" for n in names) if name not in state]
    if "bert.embeddings.word_embeddings.weight" not in state or missing:
        raise ValueError(f"its configuration cannot be told: {', '.join(missing) or 'the word embeddings'} missing")
    vocab_size, hidden_size = state["bert.embeddings.word_embeddings.weight"].shape
    conv_width, _, d_conv = state[f"{first}conv1d.weight"].shape
    d_inner, nheads = state[f"{first}out_proj.weight"].shape[1], state[f"{first}dt_bias"].shape[0]
    layers = {match[1] for name in state if (match := re.match(r"bert\.encoder\.layer\.(\d+)\.", name))}
    config = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": len(layers),
        "d_conv": d_conv,
        "expand": d_inner // hidden_size,
        "headdim": d_inner // nheads,
        "d_state": (conv_width - d_inner) // 4,
        "is_prenorm": "bert.encoder.norm_f.weight" in state,
    }
    if (types := state.get("bert.embeddings.token_type_embeddings.weight")) is not None:
        config["type_vocab_size"] = types.shape[0]
    if (positions := state.get("bert.embeddings.position_embeddings.weight")) is not None:
        config |= {"use_position_embeddings": True, "max_position_embeddings": positions.shape[0]}
    return config


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
