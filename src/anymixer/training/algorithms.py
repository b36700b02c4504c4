"""The algorithms a YAML file may name: those of Composer's that suit a language model.

Composer's remaining algorithms change images or convolutions. Those that rewrite a BERT are refused,
because here the same choice is a setting of the model, exact from the first step and kept on export.
"""

from anymixer.training.named_table import NamedTable

_IMAGES = "it is for image models"
_NO_FUSED = "Composer no longer has it (it needed apex); use low_precision_layernorm or remove the key"

ALGORITHMS = NamedTable(
    section="algorithms",
    factories={
        "ema": "composer.algorithms:EMA",
        "gradient_clipping": "composer.algorithms:GradientClipping",
        "layer_freezing": "composer.algorithms:LayerFreezing",
        "low_precision_layernorm": "anymixer.training.low_precision_layernorm:LowPrecisionLayerNorm",
        "sam": "composer.algorithms:SAM",
        "seq_length_warmup": "composer.algorithms:SeqLengthWarmup",
        "swa": "composer.algorithms:SWA",
    },
    refused={
        "alibi": "set it in the model instead: model.mixer={name: attention, positions: alibi}",
        "gated_linear_units": "set it in the model instead: model.model_config.channel_mixer={name: glu}",
        "fused_layernorm": _NO_FUSED,
        "label_smoothing": "Composer's works on classifiers whose output is one tensor",
        "factorize": "it rewrites linear layers; choose the model's widths in model.model_config",
        "gyro_dropout": "it replaces every dropout by one with fixed masks and cannot be resumed exactly",
    }
    | dict.fromkeys(
        [
            "augmix",
            "blurpool",
            "channels_last",
            "colout",
            "cutmix",
            "cutout",
            "ghost_batchnorm",
            "low_precision_groupnorm",
            "mixup",
            "progressive_resizing",
            "randaugment",
            "selective_backprop",
            "squeeze_excite",
            "stochastic_depth",
            "weight_standardization",
        ],
        _IMAGES,
    ),
)
