"""The encoder with a classifier of each token, as named entities need it."""

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import TokenClassifierOutput

from anymixer.labels import IGNORED_LABEL
from anymixer.layers.cdmoe import with_balance_losses
from anymixer.models.configuration_mixer_bert import MixerBertConfig
from anymixer.models.modeling_mixer_bert import MixerBertModel, MixerBertPreTrainedModel


class MixerBertForTokenClassification(MixerBertPreTrainedModel):
    """Encoder, dropout, one linear layer on every token.

    Of its configuration it reads, besides MixerBertConfig's own fields: num_labels; classifier_dropout
    (hidden_dropout_prob unless set).
    """

    def __init__(self, config: MixerBertConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = MixerBertModel(config)
        dropout = getattr(config, "classifier_dropout", None)
        self.dropout = nn.Dropout(config.hidden_dropout_prob if dropout is None else dropout)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

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
    ) -> TokenClassifierOutput | tuple:
        """Classify tokens; arguments as in `MixerBertModel.forward`.

        labels: [batch, length], -100 where a token has none; the loss is the mean over the others, 0 with zero
        gradients when there are none. logits: [batch, length, num_labels].
        """
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
        logits, loss = self.classifier(self.dropout(encoded.last_hidden_state)), None
        if labels is not None:
            total = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum")
            loss = with_balance_losses(self, total / (labels != IGNORED_LABEL).sum().clamp(min=1))
        output = TokenClassifierOutput(
            loss=loss,  # type: ignore[arg-type]
            logits=logits,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
        return self.shaped(output, return_dict)
