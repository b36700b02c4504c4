"""Doge and Cheems (arXiv 2412.11834) as presets of the one language model: configurations by their published names.

    from anymixer import DogeConfig, DogeForCausalLM
    model = DogeForCausalLM(DogeConfig(hidden_size=256, num_hidden_layers=8, num_attention_heads=2))

What is saved is a MixerLMConfig, and loads as one.
"""

from typing import Any

from anymixer.models.configuration_mixer_lm import MixerLMConfig
from anymixer.models.modeling_mixer_lm import MixerLMForCausalLM

DogeForCausalLM = CheemsForCausalLM = MixerLMForCausalLM


class DogeConfig(MixerLMConfig):
    """Layers of dynamic mask attention and a gated MLP, or with `is_moe` of that MLP and private experts, in residuals
    with learned weights.

    Defaults are the published code's, but for num_cdmoe_experts, there 16348, which is no square number, and for
    qk_norm, which it has not and the released models have. The published `dynamic_mask_ratio`, a share of keys to drop
    that lets tokens know of later ones, is `keep_window_size` here, the number of keys to keep.
    """

    def __init__(
        self,
        vocab_size: int = 32768,
        hidden_size: int = 1024,
        intermediate_size: int = 2048,
        num_hidden_layers: int = 32,
        hidden_bias: bool = False,
        hidden_dropout: float = 0.0,
        hidden_act: str = "silu",
        rope_theta: float = 10000.0,
        rms_norm_eps: float = 1e-6,
        num_attention_heads: int = 8,
        num_key_value_heads: int | None = None,
        attention_dropout: float = 0.0,
        keep_window_size: int = 2048,
        qk_norm: bool = False,
        is_moe: bool = False,
        num_cdmoe_experts: int = 16384,
        num_cdmoe_heads: int = 4,
        num_cdmoe_experts_per_head: int = 8,
        expert_retrieval_size: int = 64,
        bos_token_id: int | None = 0,
        eos_token_id: int | None = 1,
        pad_token_id: int | None = 2,
        **kwargs: Any,
    ) -> None:
        """kwargs: further fields of MixerLMConfig, which go before what the published names say."""
        channel = {"intermediate_size": intermediate_size, "activation": hidden_act, "bias": hidden_bias}
        experts = {
            "num_experts": num_cdmoe_experts,
            "num_heads": num_cdmoe_heads,
            "experts_per_head": num_cdmoe_experts_per_head,
            "retrieval_dim": expert_retrieval_size,
        }
        mixer = {
            "name": "dma",
            "num_heads": num_attention_heads,
            "num_kv_heads": num_key_value_heads,
            "keep_window_size": keep_window_size,
            "rotary_theta": rope_theta,
            "qk_norm": qk_norm,
            "norm_eps": rms_norm_eps,
            "dropout": attention_dropout,
            "bias": hidden_bias,
        }
        preset = {
            "mixer": mixer,
            "channel_mixer": {"name": "cdmoe", **channel, **experts}
            if is_moe
            else {"name": "glu", **channel, "down_bias": hidden_bias},
            "norm": "rms_norm",
            "norm_eps": rms_norm_eps,
            "residual_weights": True,
            "layer_dropout_prob": hidden_dropout,
        }
        super().__init__(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_hidden_layers=num_hidden_layers,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            **preset | kwargs,
        )


class CheemsConfig(DogeConfig):
    """Of every `attn_layer_period` layers one, with the index `attn_layer_offset`, is Doge's; the others have a scan
    with rotary positions in its place (state-space duality with one state number a channel of the head).

    The published scan multiplies its state by exp(+dt), which overflows within 128 tokens; here it is exp(-A dt).
    """

    def __init__(self, attn_layer_period: int = 8, attn_layer_offset: int = 7, **kwargs: Any) -> None:
        """kwargs: as DogeConfig's."""
        if "mixer" not in kwargs:
            attention = DogeConfig(**kwargs)
            heads = attention.mixer["num_heads"]
            ssd = {
                "name": "ssd",
                "expand": 1,
                "headdim": attention.hidden_size // heads,
                "d_state": attention.hidden_size // heads,
                "ngroups": heads,
                "d_conv": 0,
                "gate": False,
                "skip": False,
                "rotary": True,
                "rotary_theta": attention.mixer["rotary_theta"],
                "bias": attention.mixer["bias"],
            }
            kwargs["mixer"] = [attention.mixer if i == attn_layer_offset else ssd for i in range(attn_layer_period)]
        super().__init__(**kwargs)
