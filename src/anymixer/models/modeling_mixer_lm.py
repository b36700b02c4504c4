"""The causal language model as a Hugging Face model that generates.

Prompts are read in parallel; after that a token costs one step of every layer's mixer, whose state is all that is
kept: constant for recurrent mixers, growing for attention.
"""

from dataclasses import dataclass
from typing import Any

import torch
from anymixer_kernels.cross_entropy import cross_entropy
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.utils import ModelOutput

from anymixer.labels import IGNORED_LABEL, labelled_alone, labelled_positions
from anymixer.layers.cdmoe import with_balance_losses
from anymixer.layers.packing import Packing, make_packing
from anymixer.mixers.base import as_causal
from anymixer.models.backbone import Backbone
from anymixer.models.configuration_mixer_lm import MixerLMConfig
from anymixer.models.initialization import initialize
from anymixer.models.mixer_cache import MixerCache


@dataclass
class CausalLMOutput(ModelOutput):
    """loss: mean over labelled tokens. logits: [labelled tokens, vocab_size] when labels were given, in the order of
    `labels[:, 1:][labels[:, 1:] != -100]`, else [batch, length or logits_to_keep, vocab_size]."""

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: MixerCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class MixerLMPreTrainedModel(PreTrainedModel):
    """Initialisation and the wiring that transformers asks for."""

    config_class = MixerLMConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Layer"]
    # The state of a recurrent mixer cannot be cut back, as assisted generation would.
    _is_stateful = True
    # transformers up to 4.56 asks before it hands on a cache that is given to `generate`.
    _supports_cache_class = True

    def _init_weights(self, module: nn.Module) -> None:
        initialize(module, self.config.initializer_range)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **more: Any
    ) -> None:
        """As in transformers, whose version 4 would choose the reentrant kind: that loses the gradient of what layers
        leave beside their output, as `CrossDomainExperts` does."""
        super().gradient_checkpointing_enable({"use_reentrant": False, **(gradient_checkpointing_kwargs or {})}, **more)


class MixerLMModel(MixerLMPreTrainedModel):
    """Embeddings and backbone."""

    def __init__(self, config: MixerLMConfig) -> None:
        super().__init__(config)
        self.word = nn.Embedding(config.vocab_size, config.hidden_size)
        learned = config.position_embeddings == "learned"
        self.position = nn.Embedding(config.max_position_embeddings, config.hidden_size) if learned else None
        self.dropout = nn.Dropout(config.embedding_dropout_prob)
        self.backbone = Backbone(config, [as_causal(spec, config.hidden_size) for spec in config.layer_mixers()])
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The word embeddings."""
        return self.word

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the word embeddings."""
        self.word = value  # type: ignore[assignment]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        sequence_id: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: MixerCache | None = None,
        use_cache: bool = False,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutputWithPast | tuple:
        """Encode tokens, each from those before it; `last_hidden_state` follows the final norm.

        input_ids: [batch, length]; attention_mask: [batch, length], nonzero at real tokens, of the new tokens or, as
        transformers passes it, of all tokens so far; sequence_id: [batch, length], which sequence of a packed row a
        token belongs to, -1 for padding. past_key_values: the new tokens, all of them real, follow those it has seen.
        output_attentions: each layer's mixing matrix, [batch, groups, length, length], in quadratic time and memory;
        neither it nor output_hidden_states with a cache, whose tokens take other ways through the layers. Flags left
        out are the configuration's.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give input_ids or inputs_embeds, and not both")
        hidden = self.word(input_ids) if inputs_embeds is None else inputs_embeds
        with_matrices = _chosen(output_attentions, self.config.output_attentions)
        with_states = _chosen(output_hidden_states, self.config.output_hidden_states)
        if (with_matrices or with_states) and (use_cache or past_key_values is not None):
            raise ValueError("output_attentions, output_hidden_states: not with a cache; set use_cache=False")
        if past_key_values is not None:
            output = self._continue(hidden, past_key_values, attention_mask)
        else:
            packing = make_packing(attention_mask, sequence_id)
            hidden = self._with_positions(hidden, packing)
            if use_cache:
                output = self._prefill(hidden, packing)
            else:
                output = self._encode(hidden, packing, with_matrices, with_states)
        return output if _chosen(return_dict, self.config.return_dict) else output.to_tuple()

    def _encode(
        self, hidden: Tensor, packing: Packing | None, with_matrices: bool, with_states: bool
    ) -> BaseModelOutputWithPast:
        states = self.backbone(hidden, packing, keep_all=with_states or with_matrices)
        matrices = tuple(
            layer.mixing_matrix(state, packing)  # type: ignore[operator]
            for layer, state in zip(self.backbone.layers if with_matrices else (), states)
        )
        return BaseModelOutputWithPast(
            last_hidden_state=states[-1],
            hidden_states=tuple(states) if with_states else None,
            attentions=matrices if with_matrices else None,
        )

    def _prefill(self, hidden: Tensor, packing: Packing | None) -> BaseModelOutputWithPast:
        """Encode a prompt, and keep what its continuation needs."""
        if packing is not None and packing.packed:
            raise ValueError("use_cache: a packed row ends in one of its sequences and cannot be continued")
        output, states = self.backbone.prefill(hidden, packing)
        cache = MixerCache(states, _row_lengths(hidden, packing), hidden.shape[1])
        return BaseModelOutputWithPast(last_hidden_state=output, past_key_values=cache)  # type: ignore[arg-type]

    def _continue(self, hidden: Tensor, cache: MixerCache, attention_mask: Tensor | None) -> BaseModelOutputWithPast:
        """Read further tokens, [batch, new, d_model], one after the other."""
        new = hidden.shape[1]
        if attention_mask is not None and not attention_mask[:, -new:].all():
            raise ValueError(
                "attention_mask: a token that follows past_key_values is masked; continue rows with equally many tokens"
            )
        self._check_length(cache.seen + new)
        outputs, states, lengths = [], cache.states, cache.lengths
        for token in hidden.split(1, dim=1):
            output, states = self.backbone.step(self._embedded(token, lengths[:, None]), states)
            outputs.append(output)
            lengths = lengths + 1
        after = MixerCache(states, lengths, cache.seen + new)
        return BaseModelOutputWithPast(last_hidden_state=torch.cat(outputs, dim=1), past_key_values=after)  # type: ignore[arg-type]

    def _with_positions(self, words: Tensor, packing: Packing | None) -> Tensor:
        """Add positions to whole rows, [batch, length, d_model]."""
        self._check_length(words.shape[1])
        places = torch.arange(words.shape[1], device=words.device)[None] if packing is None else packing.positions()
        return self._embedded(words, places)

    def _check_length(self, length: int) -> None:
        """Raise for rows, padding included, that are longer than the learned positions."""
        if self.position is not None and length > self.position.num_embeddings:
            raise ValueError(f"{length} tokens, but max_position_embeddings is {self.position.num_embeddings}")

    def _embedded(self, words: Tensor, places: Tensor) -> Tensor:
        """Add positions: words [batch, length, d_model], places [batch or 1, length]."""
        return self.dropout(words if self.position is None else words + self.position(places))


class MixerLMForCausalLM(MixerLMPreTrainedModel, GenerationMixin):
    """The language model with its projection to the vocabulary."""

    _tied_weights_keys = {"lm_head.weight": "model.word.weight"}

    def __init__(self, config: MixerLMConfig) -> None:
        super().__init__(config)
        self.model = MixerLMModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        """The projection to the vocabulary."""
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the projection to the vocabulary."""
        self.lm_head = new_embeddings  # type: ignore[assignment]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        sequence_id: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        past_key_values: MixerCache | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> CausalLMOutput | tuple:
        """Predict the next token; arguments as in `MixerLMModel.forward`.

        labels: [batch, length], input_ids' own ids, -100 where a token is not to be predicted (the first of a
        sequence, padding); they are shifted here. With labels, only positions whose next token is labelled go
        through the head. logits_to_keep: logits of the last positions alone, 0 for all.
        """
        following = labelled = None
        if labels is not None:
            following = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)
            if not torch.compiler.is_compiling():  # as in MixerBertForMaskedLM
                labelled = labelled_positions(following)
        read: BaseModelOutputWithPast = self.model(
            input_ids,
            attention_mask,
            sequence_id,
            inputs_embeds,
            past_key_values,
            use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        hidden: Any = read.last_hidden_state
        loss = None
        targets = None
        if following is not None:
            hidden, targets = labelled_alone(hidden, following, labelled)
        elif logits_to_keep:
            hidden = hidden[:, -logits_to_keep:]
        logits = self.lm_head(hidden)
        if targets is not None:
            loss = with_balance_losses(self, cross_entropy(logits, targets).sum() / max(1, targets.numel()))
        output = CausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=read.past_key_values,  # type: ignore[arg-type]
            hidden_states=read.hidden_states,
            attentions=read.attentions,
        )
        return output if _chosen(return_dict, self.config.return_dict) else output.to_tuple()

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        past_key_values: MixerCache | None = None,
        inputs_embeds: Tensor | None = None,
        next_sequence_length: int | None = None,
        is_first_iteration: bool = False,
        **kwargs: object,
    ) -> dict[str, object]:
        """What `forward` reads at the next step of generation: what the cache has not seen.

        attention_mask: of all tokens so far, also where input_ids are only those that follow the cache or, after
        embeddings, those that were generated. Newer versions of transformers leave out one that hides nothing; the last
        `next_sequence_length` tokens, or all that are given, are then unseen, and is_first_iteration is theirs to say.
        """
        by_embeddings = inputs_embeds is not None and (
            is_first_iteration if attention_mask is None else inputs_embeds.shape[1] == attention_mask.shape[1]
        )
        name, tokens = ("inputs_embeds", inputs_embeds) if by_embeddings else ("input_ids", input_ids)
        assert tokens is not None
        if past_key_values is None:
            # Padding keeps attention from its fastest kernels, so none is claimed where there is none.
            mask = None if attention_mask is None or attention_mask.all() else attention_mask
            use_cache = kwargs.get("use_cache", True)
            return {name: tokens, "attention_mask": mask, "use_cache": use_cache, "logits_to_keep": 1}
        new = tokens.shape[1] if next_sequence_length is None else next_sequence_length
        if attention_mask is not None:
            new = attention_mask.shape[1] - past_key_values.seen
        if not 1 <= new <= tokens.shape[1]:
            raise ValueError(
                f"past_key_values: of {tokens.shape[1]} tokens {new} follow the {past_key_values.seen} that it has "
                "seen; give all of them and those to follow, or the latter with a mask of all"
            )
        return {
            name: tokens[:, -new:],
            # A single token is real: it was generated.
            "attention_mask": attention_mask if new > 1 else None,
            "past_key_values": past_key_values,
            "use_cache": True,
            "logits_to_keep": 1,
        }

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        """transformers asks before it makes a cache of its own."""
        return False

    def _reorder_cache(self, past_key_values: MixerCache, beam_idx: Tensor) -> MixerCache:
        """Beam search in transformers 4 calls this, in 5 the cache's own method."""
        past_key_values.reorder_cache(beam_idx)
        return past_key_values


def _chosen(argument: bool | None, configured: bool | None) -> bool:
    return bool(configured if argument is None else argument)


def _row_lengths(hidden: Tensor, packing: Packing | None) -> Tensor:
    """Real tokens of each row: int64 [batch]."""
    if packing is None:
        return torch.full(hidden.shape[:1], hidden.shape[1], device=hidden.device)
    return packing.real.sum(dim=1)
