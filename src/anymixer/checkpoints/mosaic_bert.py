"""MosaicBERT (arXiv 2312.17482) as ours: attention with ALiBi and a GeGLU after it."""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from anymixer.checkpoints.renaming import rename
from anymixer.models.configuration_mixer_bert import MixerBertConfig

_LAYER, _OURS = r"bert\.encoder\.layer\.(\d+)", r"bert.backbone.layers.\1"
_NAMES = (
    (r"bert\.embeddings\.word_embeddings\.(.*)", r"bert.embeddings.word.\1"),
    (r"bert\.embeddings\.token_type_embeddings\.(.*)", r"bert.embeddings.token_type.\1"),
    (r"bert\.embeddings\.LayerNorm\.(.*)", r"bert.embeddings.norm.\1"),
    # Queries, keys and values are one projection there too, in this order.
    (rf"{_LAYER}\.attention\.self\.Wqkv\.(.*)", rf"{_OURS}.sequence.mixer.qkv_proj.\2"),
    (rf"{_LAYER}\.attention\.output\.dense\.(.*)", rf"{_OURS}.sequence.mixer.out_proj.\2"),
    (rf"{_LAYER}\.attention\.output\.LayerNorm\.(.*)", rf"{_OURS}.sequence.norm.\2"),
    (rf"{_LAYER}\.mlp\.gated_layers\.(.*)", rf"{_OURS}.channel.mixer.gate_up.\2"),
    (rf"{_LAYER}\.mlp\.wo\.(.*)", rf"{_OURS}.channel.mixer.down.\2"),
    (rf"{_LAYER}\.mlp\.layernorm\.(.*)", rf"{_OURS}.channel.norm.\2"),
    (r"bert\.pooler\.dense\.(.*)", r"pooler.dense.\1"),
    (r"classifier\.(.*)", r"classifier.\1"),
    (r"cls\.predictions\.transform\.dense\.(.*)", r"head.dense.\1"),
    (r"cls\.predictions\.transform\.LayerNorm\.(.*)", r"head.norm.\1"),
    (r"cls\.predictions\.decoder\.(.*)", r"head.decoder.\1"),
)
# Buffers that some versions save.
_LEFT_OUT = re.compile(r"bert\.embeddings\.(position_ids|token_type_ids)|bert\.encoder\.alibi")
_SAME = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "type_vocab_size",
    "hidden_dropout_prob",
    "initializer_range",
    "layer_norm_eps",
    "pad_token_id",
)


def convert_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """MosaicBERT's parameter names -> ours. The tied decoder matrix is filled in where the file leaves it out.

    Raises UnknownNames for names that MosaicBERT does not have.
    """
    kept = {name: value for name, value in state.items() if not _LEFT_OUT.fullmatch(name)}
    converted = rename(kept, _NAMES, "MosaicBERT")
    if "head.dense.weight" in converted and "bert.embeddings.word.weight" in converted:
        converted.setdefault("head.decoder.weight", converted["bert.embeddings.word.weight"])
    return converted


def convert_config(published: Mapping[str, Any]) -> MixerBertConfig:
    """MosaicBERT's configuration as ours. Raises ValueError for an activation that our model does not compute."""
    activation = published.get("hidden_act", "gelu")
    if activation not in ("gelu", "silu", "relu"):
        raise ValueError(f"hidden_act {activation} does not convert (gelu, silu and relu do)")
    attention = {
        "num_heads": published.get("num_attention_heads", 12),
        "positions": "alibi",
        "dropout": published.get("attention_probs_dropout_prob", 0.0),
    }
    return MixerBertConfig(
        mixer={"name": "attention", **attention},
        channel_mixer={
            "name": "glu",
            "intermediate_size": published.get("intermediate_size", 3072),
            "activation": activation,
        },
        layer_dropout_prob=published.get("hidden_dropout_prob", 0.1),
        norm_eps=published.get("layer_norm_eps", 1e-12),
        **{key: published[key] for key in _SAME if key in published},
    )
