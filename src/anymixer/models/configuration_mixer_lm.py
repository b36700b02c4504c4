"""The language model's configuration, as it stands in a Hugging Face config.json."""

from typing import Any

from transformers import PretrainedConfig

from anymixer.models.backbone import ResidualOptions, cycled


class MixerLMConfig(PretrainedConfig):
    """A causal language model whose sequence mixer is a choice.

    mixer: {"name": ..., options} or a list of these, cycled over the layers; a mixer with a causal and another form
    takes the causal one. channel_mixer: the same for what follows each sequence mixer; None, alone or in the list, is
    nothing. Layers normalise before each mixer (norm: rms_norm or layer_norm) and once at the end. residual_weights:
    multiply each residual branch by a learned number per channel (arXiv 2412.11834). position_embeddings: "learned"
    (absolute, up to max_position_embeddings) or "none". embedding_dropout_prob, layer_dropout_prob: of the embeddings,
    and of each mixer's output before its residual sum.
    """

    model_type = "mixer_lm"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        vocab_size: int = 32768,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        mixer: Any = "attention",
        channel_mixer: Any = None,
        norm: str = "rms_norm",
        norm_eps: float = 1e-6,
        residual_weights: bool = False,
        position_embeddings: str = "none",
        max_position_embeddings: int = 2048,
        embedding_dropout_prob: float = 0.0,
        layer_dropout_prob: float = 0.0,
        initializer_range: float = 0.02,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        tie_word_embeddings: bool = True,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.mixer = mixer
        self.channel_mixer = channel_mixer
        self.norm = norm
        self.norm_eps = norm_eps
        self.residual_weights = residual_weights
        self.position_embeddings = position_embeddings
        self.max_position_embeddings = max_position_embeddings
        self.embedding_dropout_prob = embedding_dropout_prob
        self.layer_dropout_prob = layer_dropout_prob
        self.initializer_range = initializer_range
        self.use_cache = use_cache
        special = {"bos_token_id": bos_token_id, "eos_token_id": eos_token_id, "pad_token_id": pad_token_id}
        super().__init__(**special, tie_word_embeddings=tie_word_embeddings, **kwargs)

    def residual_options(self) -> ResidualOptions:
        """How each mixer is put into its residual."""
        return ResidualOptions(
            prenorm=True,
            norm=self.norm,  # type: ignore[arg-type]
            norm_eps=self.norm_eps,
            dropout=self.layer_dropout_prob,
            weights=self.residual_weights,
        )

    def layer_mixers(self) -> list[Any]:
        """The mixer specification of each layer."""
        return cycled(self.mixer, self.num_hidden_layers)
