"""A masked language model as Composer trains it: loss, metrics and FLOPs over the masked rows."""

from collections.abc import Mapping
from typing import Any

import torch
from anymixer_kernels.cross_entropy import cross_entropy
from composer import metrics as composer_metrics
from composer.models import ComposerModel, HuggingFaceModel
from torch import Tensor, nn
from torchmetrics import Metric
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from anymixer.errors import UserError
from anymixer.labels import IGNORED_LABEL
from anymixer.layers.cdmoe import CrossDomainExperts
from anymixer.training.parallelism import mark_repeated_layers


class MixerComposerModel(HuggingFaceModel):
    """Wrap a masked language model for Composer's Trainer.

    As a HuggingFaceModel it leaves its config and its tokenizer in every checkpoint. The metrics see the
    masked rows alone, whether the model returns logits for those rows (`[masked, vocab]`, what our models
    do when given labels) or for all (`[batch, length, vocab]`).

    A batch is a mapping with `input_ids`, `labels` (-100 where nothing is predicted) and whatever else the
    model's forward takes, all `[batch, length]`.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast | None = None) -> None:
        # HuggingFaceModel's own constructor imports every causal model of transformers (350 modules, 3 s)
        # to find out whether labels are shifted. Here they never are, so its attributes are set directly.
        ComposerModel.__init__(self)
        mark_repeated_layers(model)
        self.model = model
        self.config = model.config
        self.tokenizer = tokenizer
        self.model_forward_args = self._get_model_forward_args()
        self.using_peft = False
        self.should_save_peft_only = False
        self.body_weights, self.head_weights = matrix_weights(model)

    def forward(self, batch: Mapping[str, Tensor]) -> Any:
        """Run the model on the keys of the batch that it takes."""
        if "sequence_id" in batch and "sequence_id" not in self.model_forward_args:
            raise UserError(
                "train_loader.dataset: packed rows (of the data, or because eos_token_id or bos_token_id is set) need "
                f"a model that keeps their sequences apart, which {type(self.model).__name__} does not; "
                "use model.name=mixer_bert"
            )
        return super().forward(batch)

    def get_metrics(self, is_train: bool = False) -> dict[str, Metric]:
        """Return new metrics, the same in training and evaluation, under the names MosaicBERT logs."""
        loss = composer_metrics.LanguageCrossEntropy(ignore_index=IGNORED_LABEL)
        loss.loss_fn = SummedCrossEntropy()
        metrics = [loss, MaskedAccuracy(ignore_index=IGNORED_LABEL)]
        return {type(metric).__name__: metric for metric in metrics}

    def loss(self, outputs: Any, batch: Mapping[str, Tensor]) -> Tensor:
        """Return the mean over the masked rows of this microbatch; Composer weighs it by their number."""
        return outputs.loss

    def eval_forward(self, batch: Mapping[str, Tensor], outputs: Any | None = None) -> Any:
        """Return the outputs of the training step where there are some, else run the model."""
        return self(batch) if outputs is None else outputs

    def update_metric(self, batch: Mapping[str, Tensor], outputs: Any, metric: Metric) -> dict[str, Any]:
        """Add the masked rows of one microbatch to a metric."""
        logits, targets = masked_rows(outputs.logits, batch["labels"])
        if len(targets):  # Composer's metrics fail on no rows
            metric.update(logits, targets)
        return {}

    def flops_per_batch(self, batch: Mapping[str, Tensor]) -> float:
        """Return the floating-point operations of one training step on this rank's batch, for MFU.

        6 per matrix parameter and position (2 forward, 4 backward; Kaplan et al. 2020), positions of
        padding included because they are computed, and the vocabulary projection only where a token is
        predicted. Products without parameters (the mixing itself) and recomputation are left out, so
        the figure is a lower bound.
        """
        positions, predicted = batch["input_ids"].numel(), int((batch["labels"] != IGNORED_LABEL).sum())
        return 6.0 * (self.body_weights * positions + self.head_weights * predicted)


class MaskedAccuracy(composer_metrics.MaskedAccuracy):
    """Of rows that are all predicted. Composer's own would select them again, and wait for the device to count them."""

    def update(self, preds: Tensor, target: Tensor) -> None:
        """preds: logits [masked, vocab]; target: [masked]."""
        self.correct += (preds.argmax(dim=-1) == target).sum()
        self.total += target.numel()


class SummedCrossEntropy(nn.CrossEntropyLoss):
    """The sum over rows of the loss that training minimises, by the same op; a module, as the metric's own is."""

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """input: logits [masked, vocab]; target: [masked]."""
        return cross_entropy(input, target).sum()


def masked_rows(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits `[masked, vocab]` and labels `[masked]` of the positions that are predicted.

    Takes logits of all positions `[batch, length, vocab]` or of those alone, in the labels' order.
    """
    predicted = labels != IGNORED_LABEL
    if logits.ndim == labels.ndim + 1:
        return logits[predicted], labels[predicted]
    # Their number is known, so that nothing needs to wait for the device: in training its queue holds a backward pass.
    # A stable sort finds their places in every version of torch.
    places = predicted.flatten().to(torch.uint8).argsort(descending=True, stable=True)[: len(logits)]
    return logits, labels.flatten().index_select(0, places)


def matrix_weights(model: PreTrainedModel) -> tuple[int, int]:
    """Count the weights that multiply every position, and those that multiply the predicted ones alone.

    The latter project onto the vocabulary. Lookup tables multiply nothing and are not counted, except as
    the projection that is tied to one; of private experts those count that a position chooses.
    """
    head: nn.Parameter | None = getattr(model.get_output_embeddings(), "weight", None)
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    apart = tables if head is None else tables | {id(head)}
    body = sum(p.numel() for p in model.parameters() if p.ndim >= 2 and id(p) not in apart)
    body -= sum(module.idle_weights() for module in model.modules() if isinstance(module, CrossDomainExperts))
    return body, 0 if head is None else head.numel()
