"""The encoder with the two classifiers that mark where in a text an answer begins and where it ends."""

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import QuestionAnsweringModelOutput

from anymixer.layers.cdmoe import with_balance_losses
from anymixer.models.configuration_mixer_bert import MixerBertConfig
from anymixer.models.modeling_mixer_bert import MixerBertModel, MixerBertPreTrainedModel


class MixerBertForQuestionAnswering(MixerBertPreTrainedModel):
    """Encoder, and one linear layer with a score for the answer's first and last token (arXiv 1810.04805, 4.2)."""

    def __init__(self, config: MixerBertConfig) -> None:
        super().__init__(config)
        self.bert = MixerBertModel(config)
        self.qa_outputs = nn.Linear(config.hidden_size, 2)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        sequence_id: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        start_positions: Tensor | None = None,
        end_positions: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> QuestionAnsweringModelOutput | tuple:
        """Find an answer in each row; arguments as in `MixerBertModel.forward`.

        start_positions, end_positions: [batch], the answer's first and last token; a row whose answer lies outside
        of it teaches nothing. Given both, the loss is the mean of the two cross entropies. start_logits, end_logits:
        [batch, length].
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
        start_logits, end_logits = self.qa_outputs(encoded.last_hidden_state).unbind(-1)
        loss = None
        if start_positions is not None and end_positions is not None:
            total = _loss(start_logits, start_positions) + _loss(end_logits, end_positions)
            loss = with_balance_losses(self, total / 2)
        output = QuestionAnsweringModelOutput(
            loss=loss,  # type: ignore[arg-type]
            start_logits=start_logits,
            end_logits=end_logits,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
        return self.shaped(output, return_dict)


def _loss(logits: Tensor, positions: Tensor) -> Tensor:
    """Mean cross entropy over the rows [batch, length] that hold their position [batch]; 0 when none does."""
    positions = positions.reshape(-1)
    inside = (positions >= 0) & (positions < logits.shape[1])
    total = F.cross_entropy(logits.float(), positions.where(inside, -1), ignore_index=-1, reduction="sum")
    return total / inside.sum().clamp(min=1)
