"""The encoder with a classifier or a regressor over whole sequences, also over several in one packed row."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import ModelOutput

from anymixer.labels import IGNORED_LABEL
from anymixer.layers.cdmoe import with_balance_losses
from anymixer.models.configuration_mixer_bert import MixerBertConfig
from anymixer.models.modeling_mixer_bert import MixerBertModel, MixerBertPreTrainedModel

POOLINGS = ("cls", "mean")


@dataclass
class SequenceClassifierOutput(ModelOutput):
    """loss: mean over the labelled sequences. logits: [batch, num_labels]; [batch, sequences, num_labels] when the
    rows were packed."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class Pooler(nn.Module):
    """One vector a sequence, then Linear and tanh, as BERT has them (arXiv 1810.04805).

    pooling: `cls` takes a sequence's first token, `mean` the mean over its tokens.
    """

    def __init__(self, d_model: int, pooling: str) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"pooling: '{pooling}' is none of {', '.join(POOLINGS)}")
        self.pooling = pooling
        self.dense = nn.Linear(d_model, d_model)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None, sequence_id: Tensor | None, sequences: int | None
    ) -> Tensor:
        """hidden_states [batch, length, d_model] -> [batch, d_model], or [batch, sequences, d_model] for packed rows.

        attention_mask, sequence_id: [batch, length], as in `MixerBertModel.forward`; sequence_id counts a row's
        sequences from 0. sequences: the most that any row holds.
        """
        if sequence_id is None:
            pooled = self._whole_rows(hidden_states, attention_mask)
        else:
            assert sequences is not None
            pooled = self._packed_rows(hidden_states, sequence_id, sequences)
        return torch.tanh(self.dense(pooled))

    def _whole_rows(self, hidden_states: Tensor, attention_mask: Tensor | None) -> Tensor:
        if self.pooling == "cls":
            return hidden_states[:, 0]
        if attention_mask is None:
            return hidden_states.mean(dim=1)
        real = attention_mask.bool().unsqueeze(-1)
        # Not a product with the mask: what stands at padding is meaningless.
        return hidden_states.masked_fill(~real, 0).sum(dim=1) / real.sum(dim=1).clamp(min=1)

    def _packed_rows(self, hidden_states: Tensor, sequence_id: Tensor, sequences: int) -> Tensor:
        number = torch.arange(sequences, device=sequence_id.device)
        belongs = sequence_id[:, None, :] == number[:, None]  # [batch, sequences, length]
        if self.pooling == "cls":
            first = belongs.to(torch.uint8).argmax(dim=-1, keepdim=True).expand(-1, -1, hidden_states.shape[-1])
            return hidden_states.gather(1, first)
        counts = belongs.sum(dim=-1, keepdim=True).clamp(min=1)
        clean = hidden_states.masked_fill((sequence_id < 0)[..., None], 0)
        return belongs.to(hidden_states.dtype) @ clean / counts


class MixerBertForSequenceClassification(MixerBertPreTrainedModel):
    """Encoder, pooler, dropout, one linear layer; with `num_labels` 1, regression by squared error.

    Of its configuration it reads, besides MixerBertConfig's own fields: num_labels; pooling ("cls" unless set);
    classifier_dropout (hidden_dropout_prob unless set).
    """

    def __init__(self, config: MixerBertConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.bert = MixerBertModel(config)
        self.pooler = Pooler(config.hidden_size, getattr(config, "pooling", "cls"))
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
    ) -> SequenceClassifierOutput | tuple:
        """Classify sequences; arguments as in `MixerBertModel.forward`.

        labels: [batch], or [batch, sequences] with `sequence_id`, whose sequences count from 0 in every row and of
        which absent ones are labelled -100. Classes are integers, regression's targets floats (NaN where absent).
        Classes that do not exclude one another: [batch, num_labels], floats of 0 and 1.
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
        pooled = self.pooler(encoded.last_hidden_state, attention_mask, sequence_id, _sequences(sequence_id, labels))
        logits = self.classifier(self.dropout(pooled))
        loss = None if labels is None else with_balance_losses(self, classification_loss(logits, labels))
        output = SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=encoded.hidden_states, attentions=encoded.attentions
        )
        return self.shaped(output, return_dict)


def draw_head(model: nn.Module, std: float) -> None:
    """Draw the pooler and the classifier anew, from torch's current seed alone.

    So one seed gives one head to every encoder of a width, ours or transformers' BERT.
    """
    for name in ("bert.pooler.dense", "pooler.dense", "classifier"):
        layer = dict(model.named_modules()).get(name)
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, mean=0.0, std=std)
            nn.init.zeros_(layer.bias)


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the labelled sequences: cross entropy, or squared error where there is one logit.

    logits: [..., num_labels]; labels: [...], -100 (of classes) or NaN (of regression) where there is no sequence.
    With several logits and a float label for each, classes do not exclude one another: binary cross entropy of each.
    """
    if labels.is_floating_point() and labels.shape == logits.shape and logits.shape[-1] > 1:
        return F.binary_cross_entropy_with_logits(logits.float(), labels.float())
    # Nothing is selected by a mask: how many there are, the host would have to wait for.
    if logits.shape[-1] > 1:
        return F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORED_LABEL)
    labelled = labelled_sequences(labels)
    errors = logits[..., 0].float() - labels.where(labelled, 0).float()
    return (errors.square() * labelled).sum() / labelled.sum()


def labelled_sequences(labels: Tensor) -> Tensor:
    """bool [...]: which labels belong to a sequence."""
    return ~labels.isnan() if labels.is_floating_point() else labels != IGNORED_LABEL


def _sequences(sequence_id: Tensor | None, labels: Tensor | None) -> int | None:
    """How many sequences a packed row holds at most."""
    if sequence_id is None:
        return None
    return labels.shape[1] if labels is not None else int(sequence_id.max()) + 1
