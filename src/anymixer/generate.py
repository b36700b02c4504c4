"""Samples from a trained causal language model, ranked by how likely it finds them."""

import json
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import log_softmax
from transformers import LogitsProcessor, LogitsProcessorList

from anymixer.errors import UserError
from anymixer.export.load import LoadedModel, load_model
from anymixer.files import write_text_atomic
from anymixer.fill_mask import held_out_rows
from anymixer.models.mixer_cache import MixerCache
from anymixer.models.modeling_mixer_lm import MixerLMForCausalLM


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """max_new_tokens: of each sample. temperature: 0 takes the likeliest token always. top_k, top_p: sample among the
    likeliest tokens alone; 0 and 1 for all."""

    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def validate(self) -> None:
        """Raise UserError, naming the option, for what cannot be sampled."""
        if self.max_new_tokens < 1:
            raise UserError(f"--l-sample: {self.max_new_tokens} is not positive")
        if self.temperature < 0:
            raise UserError(f"--temperature: {self.temperature} is negative")
        if self.top_k < 0 or not 0 < self.top_p <= 1:
            raise UserError(f"--top-k, --top-p: {self.top_k} and {self.top_p} leave no token to choose")


@dataclass(frozen=True)
class Sample:
    """log_likelihood: nats per generated token under the model, whatever the temperature was."""

    prompt: str
    continuation: str
    log_likelihood: float
    tokens: int


def generate_and_print(
    source: str,
    prompts: list[str],
    *,
    n_samples: int,
    l_prefix: int,
    options: SamplingOptions,
    output: Path | None,
) -> None:
    """Continue each prompt `n_samples` times, or the first `l_prefix` tokens of `n_samples` held-out rows when there is
    no prompt; print the samples, best first, and the rate; save them as JSON lines where `output` says.

    source: names the model's checkpoint; see `open_checkpoint`.
    """
    options.validate()
    if n_samples < 1 or l_prefix < 1:
        raise UserError("--n-samples, --l-prefix: must be at least 1")
    if output is not None and output.exists():
        raise UserError(f"--output: {output} exists; choose another file")
    loaded = load_model(source)
    model, tokenizer = loaded.model, loaded.tokenizer
    if not isinstance(model, MixerLMForCausalLM):
        kind = model.config.model_type
        raise UserError(f"{source}: its model ({kind}) does not generate; `anymixer fill-mask` shows what it does")
    if prompts:
        rows = [prompt_ids(tokenizer, prompt) for prompt in prompts for _ in range(n_samples)]
    else:
        rows = _held_out_prefixes(loaded, n_samples, l_prefix)
    if not all(rows):
        raise UserError("--prompt: it has no tokens, and the tokenizer none that starts a text")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    samples, seconds = sample(model.to(device=torch.device(device)), tokenizer, rows, options)  # type: ignore[arg-type]
    if output is not None:
        write_text_atomic(output, "".join(json.dumps(asdict(s), ensure_ascii=False) + "\n" for s in samples))
    table = Table("nats/token", "prompt", "continuation", show_lines=True)
    for s in samples:
        table.add_row(f"{-s.log_likelihood:.2f}", s.prompt, s.continuation)
    Console().print(table)
    count = sum(s.tokens for s in samples)
    print(f"{count} tokens in {seconds:.1f} s on {device}: {count / seconds:,.0f} tokens/s, {len(rows)} rows at a time")
    if output is not None:
        print(f"samples      {output}")


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """The ids of a prompt as the training rows begin, with what starts a sequence and without what ends it."""
    start = start_id(tokenizer)
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    return ids if start is None else [start, *ids]


def start_id(tokenizer: Any) -> int | None:
    """The token that starts a sequence, if one does."""
    return tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id


def end_id(tokenizer: Any) -> int | None:
    """The token that ends a sequence, if one does."""
    return tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id


def _held_out_prefixes(loaded: LoadedModel, n_samples: int, l_prefix: int) -> list[list[int]]:
    """What there is of `n_samples` prefixes of `l_prefix` tokens; prints what falls short."""
    rows = held_out_rows(loaded.config, loaded.tokenizer, n_samples)
    bounds = {start_id(loaded.tokenizer), end_id(loaded.tokenizer)}
    prefixes = [first_sequence(row, bounds)[:l_prefix] for row in rows]
    if len(prefixes) < n_samples:
        print(f"--n-samples: {n_samples} asked for, {len(prefixes)} held-out rows are there")
    if short := sum(len(prefix) < l_prefix for prefix in prefixes):
        print(f"--l-prefix: {short} of {len(prefixes)} prefixes end before {l_prefix} tokens, with their text or row")
    return prefixes


def first_sequence(row: list[int], bounds: Collection[int | None]) -> list[int]:
    """A row up to where its first sequence ends, without what ends it. bounds: the tokens that start or end one."""
    return row[: next((place for place, token in enumerate(row) if place and token in bounds), len(row))]


@torch.no_grad()
def sample(
    model: MixerLMForCausalLM, tokenizer: Any, rows: list[list[int]], options: SamplingOptions
) -> tuple[list[Sample], float]:
    """One continuation per row of ids, likeliest first, and the seconds that generating took."""
    end = end_id(tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end or 0
    ids, mask = left_padded(rows, pad, model.device)
    check_positions(model, ids.shape[1], options.max_new_tokens)
    torch.manual_seed(options.seed)
    how: dict[str, Any] = {"do_sample": False}
    if options.temperature > 0:
        chosen = {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p}
        how = {"do_sample": True, **chosen}
    likelihoods = LogLikelihoods()
    began = time.perf_counter()
    sequences: Any = model.generate(
        ids,
        attention_mask=mask,
        past_key_values=read_prompts(model, ids, mask),
        max_new_tokens=options.max_new_tokens,
        eos_token_id=end,
        pad_token_id=pad,
        logits_processor=LogitsProcessorList([likelihoods]),
        **how,
    )
    seconds = time.perf_counter() - began
    new = sequences[:, ids.shape[1] :]
    # Up to and with the first end of text; what follows it is padding.
    ended = torch.zeros_like(new, dtype=torch.bool) if end is None else (new == end).cumsum(1) - (new == end).long() > 0
    scores, counts = likelihoods.of(sequences).masked_fill(ended, 0.0), (~ended).sum(1)
    samples = [
        Sample(
            prompt=tokenizer.decode(row, skip_special_tokens=True),
            continuation=tokenizer.decode(continuation[:count].tolist(), skip_special_tokens=True),
            log_likelihood=float(score / count),
            tokens=int(count),
        )
        for row, continuation, score, count in zip(rows, new, scores.sum(1), counts)
    ]
    return sorted(samples, key=lambda s: -s.log_likelihood), seconds


def check_positions(model: MixerLMForCausalLM, prompt: int, new: int) -> None:
    """Raise UserError when the model has not learned positions for a prompt and what is to follow it."""
    position = model.model.position
    if position is not None and prompt + new - 1 > position.num_embeddings:  # the last token is not read
        limit = position.num_embeddings
        raise UserError(
            f"--l-sample: {new} tokens after a prompt of {prompt}; the model has learned {limit} positions "
            "(max_position_embeddings)"
        )


def read_prompts(model: MixerLMForCausalLM, ids: Tensor, mask: Tensor) -> MixerCache | None:
    """What the model knows of all tokens but the last of each row, [batch, length]; each prompt is read but once.

    None for rows of one token.
    """
    if ids.shape[1] == 1:
        return None
    distinct, which = torch.stack([ids, mask])[:, :, :-1].unique(dim=1, return_inverse=True)
    inputs = model.prepare_inputs_for_generation(distinct[0], attention_mask=distinct[1])
    cache = model(**inputs).past_key_values
    cache.reorder_cache(which)
    return cache


class LogLikelihoods(LogitsProcessor):
    """Listens to generation for the log-likelihood of each token that it chose: in `generate`, before temperature,
    top-k and top-p change the scores. So samples need not be read again, nor logits of all their tokens be kept."""

    def __init__(self) -> None:
        self._next: Tensor | None = None
        self._chosen: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[batch, length] so far, and the scores of what may follow, [batch, vocab_size], which are returned."""
        if self._next is not None:
            self._chosen.append(self._of_last(input_ids))
        self._next = log_softmax(scores.float(), dim=-1)
        return scores

    def of(self, sequences: Tensor) -> Tensor:
        """Of the new tokens of what `generate` returned: [batch, new tokens]."""
        return torch.cat([*self._chosen, self._of_last(sequences)], dim=1)

    def _of_last(self, ids: Tensor) -> Tensor:
        assert self._next is not None
        return self._next.gather(-1, ids[:, -1:])


def left_padded(rows: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as ids and mask, [batch, longest] each, padded on the left."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask
