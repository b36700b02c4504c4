"""The encoder as Hugging Face models: the bare model and the masked-language-model head."""

from dataclasses import dataclass
from typing import Any

import torch
from anymixer_kernels.cross_entropy import cross_entropy
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils import ModelOutput

from anymixer.labels import labelled_alone, labelled_positions
from anymixer.layers.cdmoe import with_balance_losses
from anymixer.layers.embeddings import EncoderEmbeddings
from anymixer.layers.packing import make_packing
from anymixer.models.backbone import Backbone
from anymixer.models.configuration_mixer_bert import MixerBertConfig
from anymixer.models.initialization import initialize


@dataclass
class MaskedLMOutput(ModelOutput):
    """loss: mean over labelled tokens. logits: [labelled tokens, vocab_size] when labels were given, in the
    order of `labels[labels != -100]`, else [batch, length, vocab_size]."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class MixerBertPreTrainedModel(PreTrainedModel):
    """Initialisation and the wiring that transformers asks for."""

    config_class = MixerBertConfig
    base_model_prefix = "bert"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Layer"]

    def _init_weights(self, module: nn.Module) -> None:
        initialize(module, self.config.initializer_range)

    def shaped(self, output: ModelOutput, return_dict: bool | None) -> Any:
        """The output as it was asked for: itself or, with return_dict False, a tuple."""
        return output if _chosen(return_dict, self.config.return_dict) else output.to_tuple()


def _chosen(argument: bool | None, configured: bool | None) -> bool:
    return bool(configured if argument is None else argument)


class MixerBertModel(MixerBertPreTrainedModel):
    """Embeddings and backbone."""

    def __init__(self, config: MixerBertConfig) -> None:
        super().__init__(config)
        learned = config.position_embeddings == "learned"
        self.embeddings = EncoderEmbeddings(
            config.vocab_size,
            config.hidden_size,
            type_vocab_size=config.type_vocab_size,
            max_positions=config.max_position_embeddings if learned else None,
            pad_token_id=config.pad_token_id,
            norm_eps=config.layer_norm_eps,
            dropout=config.hidden_dropout_prob,
        )
        self.backbone = Backbone(config, config.layer_mixers())
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The word embeddings."""
        return self.embeddings.word

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the word embeddings."""
        self.embeddings.word = value  # type: ignore[assignment]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        sequence_id: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput | tuple:
        """Encode tokens.

        input_ids, token_type_ids: [batch, length]; attention_mask: [batch, length], nonzero at real tokens;
        sequence_id: [batch, length], which sequence of a packed row a token belongs to, -1 for padding.
        What pads a row or shares it changes nothing in a sequence's output.
        output_attentions: give each layer's mixing matrix, [batch, groups, length, length], as `attentions`; it is
        computed for this alone, in quadratic time and memory. Flags left out are the configuration's.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, and not both")
        packing = make_packing(attention_mask, sequence_id)
        hidden_states = self.embeddings(input_ids, inputs_embeds, token_type_ids, packing)
        with_matrices = _chosen(output_attentions, self.config.output_attentions)
        with_states = _chosen(output_hidden_states, self.config.output_hidden_states)
        states = self.backbone(hidden_states, packing, keep_all=with_states or with_matrices)
        matrices = tuple(
            layer.mixing_matrix(state, packing)  # type: ignore[operator]
            for layer, state in zip(self.backbone.layers if with_matrices else (), states)
        )
        output = BaseModelOutput(
            last_hidden_state=states[-1],
            hidden_states=tuple(states) if with_states else None,
            attentions=matrices if with_matrices else None,
        )
        return self.shaped(output, return_dict)


class MaskedLMHead(nn.Module):
    """Linear, GELU, LayerNorm, and the projection to the vocabulary by the word embeddings' own matrix."""

    def __init__(self, config: MixerBertConfig) -> None:
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., hidden_size] -> logits [..., vocab_size]."""
        return self.decoder(self.norm(F.gelu(self.dense(hidden_states))))


class MixerBertForMaskedLM(MixerBertPreTrainedModel):
    """The encoder with the masked-language-model head; decoder and word embeddings are one matrix."""

    # transformers 4 reads the keys of what is tied; 5 also where each is tied to.
    _tied_weights_keys = {"head.decoder.weight": "bert.embeddings.word.weight"}

    def __init__(self, config: MixerBertConfig) -> None:
        super().__init__(config)
        self.bert = MixerBertModel(config)
        self.head = MaskedLMHead(config)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The projection to the vocabulary."""
        return self.head.decoder

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the projection to the vocabulary."""
        self.head.decoder = new_embeddings  # type: ignore[assignment]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        sequence_id: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> MaskedLMOutput | tuple:
        """Predict masked tokens; arguments as in `MixerBertModel.forward`.

        labels: [batch, length], -100 where nothing is to be predicted. With labels, only labelled positions go
        through the head, and the loss is their mean: 0 with zero gradients when there are none.
        """
        labelled = None
        if labels is not None and not torch.compiler.is_compiling():
            # Before the encoder runs, since counting them waits for the device; where that breaks a compiled graph, not
            # before the encoder's, which would then be compiled for their number.
            labelled = labelled_positions(labels)
        encoded = self.bert(
            input_ids,
            attention_mask,
            token_type_ids,
            sequence_id,
            inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        hidden_states = encoded.last_hidden_state
        loss = None
        targets = None
        if labels is not None:
            hidden_states, targets = labelled_alone(hidden_states, labels, labelled)
        logits = self.head(hidden_states)
        if targets is not None:
            loss = with_balance_losses(self, cross_entropy(logits, targets).sum() / max(1, targets.numel()))
        output = MaskedLMOutput(
            loss=loss, logits=logits, hidden_states=encoded.hidden_states, attentions=encoded.attentions
        )
        return self.shaped(output, return_dict)
