"""The encoder's configuration, as it stands in a Hugging Face config.json."""

from typing import Any

from transformers import PretrainedConfig

from anymixer.models.backbone import ResidualOptions, cycled


class MixerBertConfig(PretrainedConfig):
    """A BERT whose sequence mixer is a choice.

    mixer: {"name": ..., options} or a list of these, cycled over the layers. channel_mixer: the same for what
    follows each sequence mixer; None, alone or in the list, is nothing. prenorm: normalise before each mixer and
    once at the end, instead of after each residual sum. norm_eps: of the norms between layers; layer_norm_eps: of
    embeddings and head. hidden_dropout_prob: of the embeddings; layer_dropout_prob: of each mixer's output before
    its residual sum. position_embeddings: "learned" (absolute, up to max_position_embeddings) or "none".
    vocab_size: 30528 is bert-base-uncased's 30522 rounded up to a multiple of 8.
    """

    model_type = "mixer_bert"

    def __init__(
        self,
        vocab_size: int = 30528,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        mixer: Any = "hydra",
        channel_mixer: Any = None,
        prenorm: bool = False,
        position_embeddings: str = "none",
        max_position_embeddings: int = 512,
        type_vocab_size: int = 2,
        hidden_dropout_prob: float = 0.1,
        layer_dropout_prob: float = 0.0,
        norm_eps: float = 1e-5,
        layer_norm_eps: float = 1e-12,
        initializer_range: float = 0.02,
        pad_token_id: int = 0,
        tie_word_embeddings: bool = True,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.mixer = mixer
        self.channel_mixer = channel_mixer
        self.prenorm = prenorm
        self.position_embeddings = position_embeddings
        self.max_position_embeddings = max_position_embeddings
        self.type_vocab_size = type_vocab_size
        self.hidden_dropout_prob = hidden_dropout_prob
        self.layer_dropout_prob = layer_dropout_prob
        self.norm_eps = norm_eps
        self.layer_norm_eps = layer_norm_eps
        self.initializer_range = initializer_range
        super().__init__(pad_token_id=pad_token_id, tie_word_embeddings=tie_word_embeddings, **kwargs)

    def residual_options(self) -> ResidualOptions:
        """How each mixer is put into its residual."""
        return ResidualOptions(prenorm=self.prenorm, norm_eps=self.norm_eps, dropout=self.layer_dropout_prob)

    def layer_mixers(self) -> list[Any]:
        """The mixer specification of each layer."""
        return cycled(self.mixer, self.num_hidden_layers)
