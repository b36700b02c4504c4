"""Samples from a trained causal language model, ranked by how likely it finds them."""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import log_softmax

from anymixer.errors import UserError
from anymixer.files import write_text_atomic
from anymixer.fill_mask import held_out_rows, load_run
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
    folder: Path,
    prompts: list[str],
    *,
    n_samples: int,
    l_prefix: int,
    options: SamplingOptions,
    output: Path | None,
) -> None:
    """Continue each prompt `n_samples` times, or the first `l_prefix` tokens of `n_samples` held-out rows when there is
    no prompt; print the samples, best first, and the rate; save them as JSON lines where `output` says."""
    options.validate()
    if n_samples < 1 or l_prefix < 1:
        raise UserError("--n-samples, --l-prefix: must be at least 1")
    if output is not None and output.exists():
        raise UserError(f"--output: {output} exists; choose another file")
    model, tokenizer, config = load_run(folder)
    if not isinstance(model, MixerLMForCausalLM):
        raise UserError(
            f"{folder}: its model ({config.model.name}) does not generate; `anymixer fill-mask` shows what it does"
        )
    if prompts:
        rows = [prompt_ids(tokenizer, prompt) for prompt in prompts for _ in range(n_samples)]
    else:
        rows = [row[:l_prefix] for row in held_out_rows(config, tokenizer, n_samples)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    samples, seconds = sample(model.to(device=torch.device(device)), tokenizer, rows, options)  # type: ignore[arg-type]
    table = Table("nats/token", "prompt", "continuation", show_lines=True)
    for s in samples:
        table.add_row(f"{-s.log_likelihood:.2f}", s.prompt, s.continuation)
    Console().print(table)
    count = sum(s.tokens for s in samples)
    print(f"{count} tokens in {seconds:.1f} s on {device}: {count / seconds:,.0f} tokens/s, {len(rows)} rows at a time")
    if output is not None:
        write_text_atomic(output, "".join(json.dumps(asdict(s), ensure_ascii=False) + "\n" for s in samples))
        print(f"samples      {output}")


def prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """The ids of a prompt as the training rows begin, with what starts a sequence and without what ends it."""
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.cls_token_id
    ids = tokenizer.encode(prompt, add_special_tokens=False)
    return ids if start is None else [start, *ids]


@torch.no_grad()
def sample(
    model: MixerLMForCausalLM, tokenizer: Any, rows: list[list[int]], options: SamplingOptions
) -> tuple[list[Sample], float]:
    """One continuation per row of ids, likeliest first, and the seconds that generating took."""
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end or 0
    ids, mask = left_padded(rows, pad, model.device)
    torch.manual_seed(options.seed)
    how: dict[str, Any] = {"do_sample": False}
    if options.temperature > 0:
        chosen = {"temperature": options.temperature, "top_k": options.top_k, "top_p": options.top_p}
        how = {"do_sample": True, **chosen}
    began = time.perf_counter()
    sequences: Any = model.generate(
        ids, attention_mask=mask, max_new_tokens=options.max_new_tokens, eos_token_id=end, pad_token_id=pad, **how
    )
    seconds = time.perf_counter() - began
    new = sequences[:, ids.shape[1] :]
    # Up to and with the first end of text; what follows it is padding.
    ended = torch.zeros_like(new, dtype=torch.bool) if end is None else (new == end).cumsum(1) - (new == end).long() > 0
    scores = token_log_likelihoods(model, sequences, mask, ids.shape[1]).masked_fill(ended, 0.0)
    counts = (~ended).sum(1)
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


def token_log_likelihoods(model: MixerLMForCausalLM, sequences: Tensor, mask: Tensor, prompt: int) -> Tensor:
    """Log-likelihood of every token after the first `prompt` of each row: [batch, new tokens]."""
    new = sequences.shape[1] - prompt
    mask = torch.cat([mask, mask.new_ones(len(mask), new)], dim=1)
    logits = model(sequences, attention_mask=mask).logits[:, prompt - 1 : -1]
    return log_softmax(logits.float(), -1).gather(-1, sequences[:, prompt:, None])[..., 0]


def left_padded(rows: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as ids and mask, [batch, longest] each, padded on the left."""
    longest = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask
