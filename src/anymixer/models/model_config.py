"""The `model:` section of a YAML file, and the model it describes."""

import dataclasses
import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from anymixer.errors import UserError, suggest

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MODEL_NAMES = ("mixer_bert", "causal_lm", "hf_bert")
# Those over our own backbone, whose mixer is a choice.
MIXER_MODELS = ("mixer_bert", "causal_lm")

# Names that people coming from MosaicBERT or Hydra write, and what to write instead.
RENAMED_MODELS = {
    "mosaic_bert": "use mixer_bert with the attention mixer (see yamls/pretrain/mosaic_bert.yaml)",
    "bert": "use mixer_bert with the hydra mixer (see yamls/pretrain/hydra.yaml)",
}
RENAMED_MODEL_KEYS = {
    "num_attention_heads": "set model.mixer.num_heads",
    "attention_probs_dropout_prob": "set model.mixer.dropout",
    "alibi_starting_size": "ALiBi needs no size; set model.mixer.positions: alibi",
    "intermediate_size": "set channel_mixer: {name: mlp, intermediate_size: ...}",
    "hidden_act": "set channel_mixer: {name: mlp, activation: ...}",
    "use_position_embeddings": "set position_embeddings: learned or none",
    "matrix_mixer_type": "set model.mixer.name",
    "is_prenorm": "set prenorm",
    "max_position_embedding": "set max_position_embeddings",
    **{key: f"set model.mixer.{key}" for key in ("d_conv", "expand", "chunk_size", "d_state", "headdim", "qk_dim")},
    "is_data_dependent": "set model.mixer.is_data_dependent",
}


@dataclass(kw_only=True)
class ModelConfig:
    """What to build.

    name: mixer_bert (ours, an encoder), causal_lm (ours, a language model), or hf_bert (transformers' own
    BertForMaskedLM, untouched, as a baseline).
    mixer: name and options of the sequence mixer, or a list cycled over the layers. model_config: fields of
    MixerBertConfig, MixerLMConfig, or transformers' BertConfig for hf_bert. gradient_checkpointing: recompute layers in
    the backward pass. pretrained_checkpoint: a Composer checkpoint whose weights to start from, all of them.
    pretrained_model_name, use_pretrained: hf_bert only; a name or folder, and whether to take its weights
    too. tokenizer_name: must agree with the top level's where given.
    """

    name: str = "mixer_bert"
    mixer: Any = None
    model_config: dict[str, Any] = field(default_factory=dict)
    gradient_checkpointing: bool = False
    pretrained_checkpoint: str | None = None
    pretrained_model_name: str | None = None
    use_pretrained: bool = False
    tokenizer_name: str | None = None

    def validate(self) -> None:
        """Raise UserError, naming the key, for what cannot be built."""
        if self.name in RENAMED_MODELS:
            raise UserError(f"model.name: '{self.name}': {RENAMED_MODELS[self.name]}")
        if self.name not in MODEL_NAMES:
            hint = suggest(self.name, MODEL_NAMES)
            raise UserError(f"model.name: unknown model '{self.name}'{hint} (known: {', '.join(MODEL_NAMES)})")
        if self.name == "hf_bert":
            self._validate_hf_bert()
        else:
            self._validate_mixer_model()

    def _validate_hf_bert(self) -> None:
        if self.mixer is not None:
            raise UserError("model.mixer: hf_bert has no choice of mixer; use model.name: mixer_bert")
        from transformers import BertConfig

        known = set(BertConfig().to_dict())
        for key in self.model_config:
            if key not in known:
                raise UserError(f"model.model_config.{key}: BertConfig has no such field{suggest(key, known)}")
        if self.use_pretrained and not self.pretrained_model_name:
            raise UserError("model.use_pretrained: needs model.pretrained_model_name, a name or a folder")

    def _validate_mixer_model(self) -> None:
        for key in ("pretrained_model_name", "use_pretrained"):
            if getattr(self, key):
                raise UserError(f"model.{key}: only hf_bert reads it; use model.pretrained_checkpoint")
        for key in self.model_config:
            if key in RENAMED_MODEL_KEYS:
                raise UserError(f"model.model_config.{key}: {RENAMED_MODEL_KEYS[key]}")
            if key == "mixer":
                raise UserError("model.model_config.mixer: set model.mixer")
        architecture = self._architecture()
        self._validate_sizes(architecture)
        self._mixer_options(architecture.hidden_size)
        self._validate_channel_mixers(architecture.channel_mixer)

    def _architecture(self) -> Any:
        """`model_config`, typed by the signature of the model's own configuration class."""
        from anymixer.options import parse_options

        parameters = list(inspect.signature(self._config_class()).parameters.values())
        fields = [
            (p.name, p.annotation, field(default=p.default))
            for p in parameters
            if p.kind is not p.VAR_KEYWORD and p.name != "mixer"
        ]
        cls = dataclasses.make_dataclass("Architecture", fields, kw_only=True)
        return parse_options(cls, self.model_config, "model.model_config")

    @staticmethod
    def _validate_sizes(architecture: Any) -> None:
        for key in ("vocab_size", "hidden_size", "num_hidden_layers", "max_position_embeddings"):
            if getattr(architecture, key) < 1:
                raise UserError(f"model.model_config.{key}: {getattr(architecture, key)} is not positive")
        for key in ("hidden_dropout_prob", "layer_dropout_prob"):
            if not 0 <= getattr(architecture, key, 0.0) <= 1:
                raise UserError(f"model.model_config.{key}: {getattr(architecture, key)} is no probability")
        for key in ("initializer_range", "type_vocab_size"):
            if getattr(architecture, key, 0) < 0:
                raise UserError(f"model.model_config.{key}: {getattr(architecture, key)} is negative")
        if architecture.position_embeddings not in ("none", "learned"):
            raise UserError(
                f"model.model_config.position_embeddings: '{architecture.position_embeddings}' is neither none nor "
                "learned (rotary and alibi are the attention mixer's: model.mixer.positions)"
            )
        if getattr(architecture, "norm", "layer_norm") not in ("layer_norm", "rms_norm"):
            raise UserError(f"model.model_config.norm: '{architecture.norm}' is neither layer_norm nor rms_norm")

    @staticmethod
    def _validate_channel_mixers(choice: Any) -> None:
        from anymixer.layers.channel_mixers import channel_mixers

        key = "model.model_config.channel_mixer"
        many = isinstance(choice, (list, tuple))
        if many and not choice:
            raise UserError(f"{key}: an empty list; null is none")
        for place, spec in enumerate(choice if many else [choice]):
            if spec is not None:
                channel_mixers.parse(spec, f"{key}[{place}]" if many else key)

    def _config_class(self) -> Any:
        from anymixer.models.configuration_mixer_bert import MixerBertConfig
        from anymixer.models.configuration_mixer_lm import MixerLMConfig

        return MixerLMConfig if self.name == "causal_lm" else MixerBertConfig

    def vocab_size(self) -> int:
        """Rows of the embedding matrix that will be built."""
        return self.hugging_face_config().vocab_size

    def row_limits(self) -> dict[str, int]:
        """What bounds the length of the model's rows: key -> most tokens; empty without a limit."""
        config = self.hugging_face_config()
        limits = {}
        if self.name == "hf_bert" or config.position_embeddings == "learned":
            limits["model.model_config.max_position_embeddings"] = config.max_position_embeddings
        if self.name in MIXER_MODELS:
            limits |= {
                f"{path}.max_seq_len": longest
                for path, options in self._mixer_options(config.hidden_size)
                if (longest := options.longest_row()) is not None
            }
        return limits

    def _mixer_options(self, width: int) -> list[tuple[str, Any]]:
        """Key and checked options of each mixer."""
        from anymixer.mixers.base import as_causal, parse_mixer

        many = isinstance(self.mixer, (list, tuple))
        if self.mixer is None or (many and not self.mixer):
            raise UserError("model.mixer: missing; give a mixer's name, e.g. mixer: {name: hydra}")
        specs = self.mixer if many else [self.mixer]
        paths = [f"model.mixer[{i}]" if many else "model.mixer" for i in range(len(specs))]
        if self.name == "causal_lm":
            specs = [as_causal(spec, width, path) for path, spec in zip(paths, specs)]
        return [(path, parse_mixer(spec, width, path)[1]) for path, spec in zip(paths, specs)]

    def hugging_face_config(self) -> Any:
        """MixerBertConfig, MixerLMConfig, or transformers' BertConfig for hf_bert."""
        if self.name in MIXER_MODELS:
            return self._config_class()(mixer=self.mixer, **self.model_config)
        from transformers import AutoConfig, BertConfig

        name = self.pretrained_model_name
        # BertConfig's defaults are bert-base-uncased's own, so a model from scratch needs no download.
        if name is None or (name == "bert-base-uncased" and not self.use_pretrained):
            return BertConfig(**self.model_config)
        try:
            return AutoConfig.from_pretrained(name, **self.model_config)
        except OSError as error:
            raise UserError(
                f"model.pretrained_model_name: cannot load '{name}' "
                f"(neither a folder nor reachable on the Hub): {str(error).splitlines()[0]}"
            ) from error


def build_model(config: ModelConfig, *, load_weights: bool = True) -> "PreTrainedModel":
    """The model with its language-model head, in float32 on the default device.

    load_weights: False leaves out pretrained weights, which a model on the `meta` device cannot take.
    Raises UserError for weights that cannot be found or do not fit.
    """
    config.validate()
    if config.name == "mixer_bert":
        from anymixer.models.modeling_mixer_bert import MixerBertForMaskedLM

        model = MixerBertForMaskedLM(config.hugging_face_config())
    elif config.name == "causal_lm":
        from anymixer.models.modeling_mixer_lm import MixerLMForCausalLM

        model = MixerLMForCausalLM(config.hugging_face_config())
    else:
        model = _build_hf_bert(config, load_weights)
    if config.pretrained_checkpoint is not None and load_weights:
        from anymixer.models.checkpoint_weights import load_checkpoint_weights

        load_checkpoint_weights(model, config.pretrained_checkpoint, "model.pretrained_checkpoint")
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def build_classifier(
    config: ModelConfig, num_labels: int, *, pooling: str = "cls", classifier_dropout: float | None = None
) -> "PreTrainedModel":
    """The model with a new head over whole sequences, all of it drawn at random: no weights are loaded.

    num_labels: classes; 1 is regression. pooling: cls or mean. classifier_dropout: before the last layer; None is
    the model's hidden_dropout_prob. Raises UserError, naming the key, for what cannot be built.
    """
    from anymixer.models.sequence_classification import POOLINGS, MixerBertForSequenceClassification

    config.validate()
    if pooling not in POOLINGS:
        raise UserError(f"pooling: '{pooling}' is none of {', '.join(POOLINGS)}")
    hf_config = config.hugging_face_config()
    hf_config.num_labels, hf_config.classifier_dropout = num_labels, classifier_dropout
    if config.name == "mixer_bert":
        hf_config.pooling = pooling
        model = MixerBertForSequenceClassification(hf_config)
    else:
        from transformers import BertForSequenceClassification

        if pooling != "cls":
            raise UserError(f"pooling: hf_bert pools cls alone, not {pooling}; use model.name: mixer_bert")
        hf_config.problem_type = "regression" if num_labels == 1 else "single_label_classification"
        model = BertForSequenceClassification(hf_config)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _build_hf_bert(config: ModelConfig, load_weights: bool) -> "PreTrainedModel":
    from transformers import BertForMaskedLM

    hf_config = config.hugging_face_config()
    if not (config.use_pretrained and load_weights):
        return BertForMaskedLM(hf_config)
    return BertForMaskedLM.from_pretrained(config.pretrained_model_name, config=hf_config)
