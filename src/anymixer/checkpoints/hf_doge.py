"""Hugging Face's Doge (`transformers.models.doge`, `SmallDoge/Doge-160M` and others) as our language model with the
`dma` mixer.

The logits are those of its `eager` attention. With `sdpa`, its default, rows without padding see the future (seen in
transformers 5.17). Where keys are dropped (longer than keep_window_size), of equal ones it keeps any, and ours the
later. Its mixture of experts is left out: there a token's experts are chosen by other tokens, of its future and of
other rows.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anymixer.checkpoints.renaming import UnknownNames, rename

if TYPE_CHECKING:
    from anymixer.models.configuration_mixer_lm import MixerLMConfig

ORIGINAL = "transformers' DogeForCausalLM"
_LAYER, _OURS = r"model\.layers\.(\d+)", r"model.backbone.layers.\1"
_NAMES = (
    (r"model\.embed_tokens\.weight", r"model.word.weight"),
    (r"model\.norm\.weight", r"model.backbone.final_norm.weight"),
    (r"lm_head\.weight", r"lm_head.weight"),
    (rf"{_LAYER}\.input_layernorm\.weight", rf"{_OURS}.sequence.norm.weight"),
    (rf"{_LAYER}\.input_residual", rf"{_OURS}.sequence.weight"),
    (rf"{_LAYER}\.post_attention_layernorm\.weight", rf"{_OURS}.channel.norm.weight"),
    (rf"{_LAYER}\.post_attention_residual", rf"{_OURS}.channel.weight"),
    (rf"{_LAYER}\.self_attn\.o_proj\.(.*)", rf"{_OURS}.sequence.mixer.out_proj.\2"),
    (rf"{_LAYER}\.self_attn\.(A|(?:dt_proj|q_norm|k_norm)\..*)", rf"{_OURS}.sequence.mixer.\2"),
    (rf"{_LAYER}\.mlp\.down_proj\.(.*)", rf"{_OURS}.channel.mixer.down.\2"),
)
# Projections that are one matrix here: ours, and theirs in its order.
_JOINED = {
    "sequence.mixer.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "channel.mixer.gate_up": ("mlp.gate_proj", "mlp.up_proj"),
}
_PART = re.compile(rf"{_LAYER}\.(?:self_attn\.[qkv]|mlp\.(?:gate|up))_proj\.(weight|bias)")


def convert_weights(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of Hugging Face's Doge -> ours. Raises UnknownNames, a KeyError, for names that it does not have or
    lacks."""
    parts = {name: match for name in state if (match := _PART.fullmatch(name))}
    rest = {name: value for name, value in state.items() if name not in parts}
    converted = rename(rest, _NAMES, "Hugging Face's Doge")
    for layer, kind in dict.fromkeys((match[1], match[2]) for match in parts.values()):
        for ours, theirs in _JOINED.items():
            names = [f"model.layers.{layer}.{part}.{kind}" for part in theirs]
            found = [name for name in names if name in state]
            if found and len(found) < len(names):
                raise UnknownNames(f"half a projection of Hugging Face's Doge: only {', '.join(found)}")
            if found:
                converted[f"model.backbone.layers.{layer}.{ours}.{kind}"] = torch.cat([state[name] for name in names])
    return converted


def convert_config(doge: Mapping[str, Any]) -> "MixerLMConfig":
    """The configuration of a Doge (the fields of transformers' DogeConfig, of its version 4 or 5) as ours.

    Rotary positions of the kind `dynamic` are taken for plain ones, which they are up to max_position_embeddings.
    Raises ValueError for what our model does not compute.
    """
    from anymixer.models.configuration_mixer_lm import MixerLMConfig

    rotary = doge.get("rope_parameters") or doge.get("rope_scaling") or {}
    _check(doge, rotary.get("rope_type", rotary.get("type", "default")))
    bias, mlp_bias = doge.get("attention_bias", False), doge.get("mlp_bias", False)
    eps = doge.get("rms_norm_eps", 1e-6)
    mixer = {
        "name": "dma",
        "num_heads": doge["num_attention_heads"],
        "num_kv_heads": doge.get("num_key_value_heads"),
        "keep_window_size": doge.get("keep_window_size", 2048),
        "rotary_theta": float(rotary.get("rope_theta", doge.get("rope_theta", 10000.0))),
        "qk_norm": True,
        "norm_eps": eps,
        "dropout": doge.get("attention_dropout") or 0.0,
        "bias": bias,
    }
    channel = {"intermediate_size": doge["intermediate_size"], "activation": doge.get("hidden_act", "silu")}
    same = ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings", "initializer_range")
    tokens = ("bos_token_id", "eos_token_id", "pad_token_id")
    return MixerLMConfig(
        mixer=mixer,
        channel_mixer={"name": "glu", **channel, "bias": mlp_bias, "down_bias": mlp_bias},
        norm="rms_norm",
        norm_eps=eps,
        residual_weights=True,
        layer_dropout_prob=doge.get("hidden_dropout", 0.0),
        tie_word_embeddings=doge.get("tie_word_embeddings", False),
        **{key: doge[key] for key in (*same, *tokens) if key in doge},
    )


def _check(doge: Mapping[str, Any], rope_type: str) -> None:
    if doge.get("model_type", "doge") != "doge":
        raise ValueError(f"its configuration is of model_type {doge['model_type']}, not doge")
    if doge.get("is_moe"):
        raise ValueError("is_moe: its experts are chosen by other tokens and rows, which ours are not; train anew")
    if doge.get("sliding_window") is not None:
        raise ValueError(f"sliding_window: {doge['sliding_window']}: our mixer has no such window")
    if rope_type not in ("default", "dynamic"):
        raise ValueError(f"rope_type: {rope_type}: only default and dynamic convert")
    width = doge["hidden_size"] // doge["num_attention_heads"]
    if doge.get("head_dim") not in (None, width):
        raise ValueError(f"head_dim: {doge['head_dim']} is not hidden_size / num_attention_heads = {width}")


@torch.no_grad()
def original_logits(config: Mapping[str, Any], state: Mapping[str, Tensor], ids: Tensor, mask: Tensor) -> Tensor | None:
    """Logits [batch, length, vocab_size] of ORIGINAL with the checkpoint's weights and eager attention; None where
    transformers is older than its Doge. Raises ValueError for weights that it lacks."""
    try:
        from transformers.models.doge import DogeConfig, DogeForCausalLM  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    doge = DogeConfig.from_dict(dict(config))
    doge._attn_implementation = "eager"
    model = DogeForCausalLM(doge)
    found = model.load_state_dict(dict(state), strict=False)
    tied = ["lm_head.weight"] if doge.tie_word_embeddings else []
    if missing := [name for name in found.missing_keys if name not in tied]:
        raise ValueError(f"{len(missing)} missing ({', '.join(missing[:3])})")
    model.tie_weights()
    return model.eval()(input_ids=ids, attention_mask=mask).logits
