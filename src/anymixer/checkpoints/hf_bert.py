"""Hugging Face's BERT as ours: names of its weights, and its configuration, with the attention mixer."""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from anymixer.checkpoints.renaming import UnknownNames, rename
from anymixer.models.configuration_mixer_bert import MixerBertConfig

ORIGINAL = "transformers' BertForMaskedLM"
_LAYER, _OURS = r"bert\.encoder\.layer\.(\d+)", r"bert.backbone.layers.\1"
_NAMES = (
    (r"bert\.embeddings\.word_embeddings\.(.*)", r"bert.embeddings.word.\1"),
    (r"bert\.embeddings\.token_type_embeddings\.(.*)", r"bert.embeddings.token_type.\1"),
    (r"bert\.embeddings\.position_embeddings\.(.*)", r"bert.embeddings.position.\1"),
    (r"bert\.embeddings\.LayerNorm\.(.*)", r"bert.embeddings.norm.\1"),
    (rf"{_LAYER}\.attention\.output\.dense\.(.*)", rf"{_OURS}.sequence.mixer.out_proj.\2"),
    (rf"{_LAYER}\.attention\.output\.LayerNorm\.(.*)", rf"{_OURS}.sequence.norm.\2"),
    (rf"{_LAYER}\.intermediate\.dense\.(.*)", rf"{_OURS}.channel.mixer.up.\2"),
    (rf"{_LAYER}\.output\.dense\.(.*)", rf"{_OURS}.channel.mixer.down.\2"),
    (rf"{_LAYER}\.output\.LayerNorm\.(.*)", rf"{_OURS}.channel.norm.\2"),
    (r"bert\.pooler\.dense\.(.*)", r"pooler.dense.\1"),
    (r"classifier\.(.*)", r"classifier.\1"),
    (r"cls\.predictions\.transform\.dense\.(.*)", r"head.dense.\1"),
    (r"cls\.predictions\.transform\.LayerNorm\.(.*)", r"head.norm.\1"),
    (r"cls\.predictions\.decoder\.(.*)", r"head.decoder.\1"),
)
_PROJECTION = re.compile(rf"{_LAYER}\.attention\.self\.(query|key|value)\.(weight|bias)")
# The next-sentence head, which we have not; a buffer of old versions; and the decoder's bias under its other name.
_LEFT_OUT = re.compile(r"cls\.seq_relationship\..*|bert\.embeddings\.position_ids|cls\.predictions\.bias")


def standard_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the names that today's BertForMaskedLM and BertForSequenceClassification have.

    A bare BertModel saves them without `bert.`; the first checkpoints call a norm's values gamma and beta, and keep
    a buffer of positions.
    """
    bare = not any(name.startswith("bert.") for name in state)
    renamed = {}
    for name, value in state.items():
        name = re.sub(r"LayerNorm\.gamma$", "LayerNorm.weight", name)
        name = re.sub(r"LayerNorm\.beta$", "LayerNorm.bias", name)
        if bare and name.partition(".")[0] in ("embeddings", "encoder", "pooler"):
            name = f"bert.{name}"
        if name != "bert.embeddings.position_ids":
            renamed[name] = value
    return renamed


def convert_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of Hugging Face's BERT -> ours; queries, keys and values become the one projection of our attention.

    The next-sentence head is left out. Raises UnknownNames, a KeyError, for names that BERT does not have or lacks.
    """
    state = standard_names(state)
    projections = {name: match for name in state if (match := _PROJECTION.fullmatch(name))}
    converted = rename(
        {name: value for name, value in state.items() if name not in projections and not _LEFT_OUT.fullmatch(name)},
        _NAMES,
        "Hugging Face's BERT",
    )
    for layer, kind in dict.fromkeys((match[1], match[3]) for match in projections.values()):
        parts = [f"bert.encoder.layer.{layer}.attention.self.{part}.{kind}" for part in ("query", "key", "value")]
        if missing := [part for part in parts if part not in state]:
            raise UnknownNames(f"half a projection of Hugging Face's BERT: {', '.join(missing)} missing")
        joined = torch.cat([state[part] for part in parts])
        converted[f"bert.backbone.layers.{layer}.sequence.mixer.qkv_proj.{kind}"] = joined
    if "cls.predictions.bias" in state:
        converted["head.decoder.bias"] = state["cls.predictions.bias"]
    if "head.dense.weight" in converted and "bert.embeddings.word.weight" in converted:
        converted.setdefault("head.decoder.weight", converted["bert.embeddings.word.weight"])
    return converted


def convert_config(bert: Mapping[str, Any]) -> MixerBertConfig:
    """The configuration of a BERT (BertConfig's fields) as ours.

    Raises ValueError for what our model does not compute: other activations than gelu, silu and relu, relative
    positions, a decoder.
    """
    activation, positions = bert.get("hidden_act", "gelu"), bert.get("position_embedding_type", "absolute")
    if activation not in ("gelu", "silu", "relu") or positions not in ("absolute", None) or bert.get("is_decoder"):
        raise ValueError(f"not a BERT that converts: hidden_act {activation}, position_embedding_type {positions}")
    same = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "max_position_embeddings",
        "type_vocab_size",
        "hidden_dropout_prob",
        "initializer_range",
        "layer_norm_eps",
        "pad_token_id",
    )
    attention = {"num_heads": bert["num_attention_heads"], "dropout": bert.get("attention_probs_dropout_prob", 0.1)}
    return MixerBertConfig(
        mixer={"name": "attention", **attention},
        channel_mixer={"name": "mlp", "intermediate_size": bert["intermediate_size"], "activation": activation},
        position_embeddings="learned",
        layer_dropout_prob=bert.get("hidden_dropout_prob", 0.1),
        norm_eps=bert.get("layer_norm_eps", 1e-12),
        **{key: bert[key] for key in same if key in bert},
    )


@torch.no_grad()
def original_logits(config: Mapping[str, Any], state: Mapping[str, Tensor], ids: Tensor, mask: Tensor) -> Tensor:
    """Logits [batch, length, vocab_size] of ORIGINAL with the checkpoint's weights.

    Raises ValueError for weights that it lacks.
    """
    from transformers import BertConfig, BertForMaskedLM

    model = BertForMaskedLM(BertConfig.from_dict(dict(config)))
    found = model.load_state_dict(standard_names(state), strict=False)
    # The decoder's matrix and bias have two names each, of which a file may leave one out.
    twice = ("cls.predictions.decoder.", "cls.predictions.bias")
    if missing := [name for name in found.missing_keys if not name.startswith(twice)]:
        raise ValueError(f"{len(missing)} missing ({', '.join(missing[:3])})")
    model.tie_weights()
    return model.eval()(input_ids=ids, attention_mask=mask).logits
