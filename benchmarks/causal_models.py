"""Train causal language models of one size on the same tokens; one table and one plot of what they reached.

    python benchmarks/causal_models.py data_local=data/text-512 tokenizer_name=bert-base-uncased --tokens 20000000
    python benchmarks/causal_models.py data_local=data/demo tokenizer_name=data/demo/tokenizer --tokens 200000 \\
        max_seq_len=128 global_train_batch_size=16 device_train_microbatch_size=16     # a laptop

YAML files (yamls/causal/compare/ unless others are given) are trained by main.py, one after the other, as `anymixer
compare` does it; `key=value` is set on top of each, `compile=true` too. Started again with the same arguments, finished
runs are not trained again. Each checkpoint then reads contexts of random tokens, and its decoding steps are timed: the
model's own, with the cache that `generate` keeps, the likeliest token fed back; float32 on a CPU, bfloat16 weights on a
GPU. Training tokens/s are the median step's, without evaluation.
"""

import argparse
import dataclasses
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from timing import describe_machine
from torch import Tensor

from anymixer.compare import Run, plan_runs, raise_for_failed, train_runs
from anymixer.config import load_config
from anymixer.entry_point import run as run_program
from anymixer.errors import UserError
from anymixer.files import write_text_atomic
from anymixer.fill_mask import load_run
from anymixer.models.modeling_mixer_lm import MixerLMForCausalLM
from anymixer.report.comparison import Result, best_first, draw_losses, markdown_table, short_names
from anymixer.report.figures import save_figure

FILES = Path("yamls/causal/compare")
WARM_UP = 3
# What must be the same for all, or their losses could not be compared.
EQUAL = ("data_local", "tokenizer_name", "max_seq_len", "global_train_batch_size", "max_duration", "seed")


@dataclass(frozen=True)
class Decoding:
    """context: tokens read before. tokens_per_second: of all rows. state_bytes: a row's, after the context."""

    context: int
    tokens_per_second: float
    state_bytes: int


def continuation(model: MixerLMForCausalLM, context: int, rows: int) -> tuple[Callable[[], Tensor], int]:
    """A function that decodes the next likeliest token of each of `rows` rows, int64 [rows, 1], and the bytes of a
    row's state after the `context` random tokens that they begin with."""
    generator = torch.Generator().manual_seed(context)
    ids = torch.randint(model.config.vocab_size, (1, context), generator=generator).to(model.device)
    # One context is read for all rows, as a prompt's samples share it.
    read: Any = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    cache, logits = read.past_key_values, read.logits.expand(rows, -1, -1)
    size = cache.num_bytes()
    cache.reorder_cache(torch.zeros(rows, dtype=torch.int64, device=model.device))

    def step() -> Tensor:
        nonlocal cache, logits
        likeliest = logits[:, -1].argmax(-1, keepdim=True)
        output = model(input_ids=likeliest, past_key_values=cache, use_cache=True)
        cache, logits = output.past_key_values, output.logits
        return likeliest

    return step, size


def median_seconds(step: Callable[[], object], device: torch.device, steps: int) -> float:
    """Of a step by the wall clock, to the end of the device's work: launching it is part of what decoding costs."""
    times = []
    for _ in range(WARM_UP + steps):
        start = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[WARM_UP:])


@torch.no_grad()
def decodings(folder: Path, options: argparse.Namespace, device: torch.device) -> list[Decoding]:
    """Of the model that the run in `folder` ended with, after each context."""
    model: Any = load_run(folder)[0]
    model = model.to(device=device, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    found = []
    for context in options.contexts:
        step, size = continuation(model, context, options.rows)
        found.append(Decoding(context, options.rows / median_seconds(step, device, options.steps), size))
    return found


def check_comparable(runs: list[Run]) -> None:
    """Raise UserError for a model that does not generate, and for a key of EQUAL that is not the same in all files."""
    for run in runs:
        if run.config.model.name != "causal_lm":
            raise UserError(f"{run.name}: model.name: {run.config.model.name} does not generate; causal_lm does")
    for key in EQUAL:
        values = {run.name: getattr(run.config, key) for run in runs}
        if len(set(values.values())) > 1:
            raise UserError(f"{key}: the files differ ({values}); set one for all: {key}=...")


def duration(files: list[str], overrides: list[str], tokens: int) -> str:
    """`tokens` as a number of steps of the first file."""
    config = load_config(files[0], overrides)
    return f"{max(1, round(tokens / (config.global_train_batch_size * config.max_seq_len)))}ba"


def heads(contexts: list[int]) -> list[str]:
    """The columns of the table."""
    decoding = [f"decode tokens/s at {context:,}" for context in contexts]
    states = [f"state kB a row at {context:,}" for context in contexts]
    return ["model", "parameters", "perplexity", "train tokens/s", "peak memory", *decoding, *states]


def row(name: str, result: Result, decoded: list[Decoding]) -> list[str]:
    """A model's cells."""
    cells = result.cells(name)
    training = [cells[column] for column in ("run", "parameters", "perplexity", "tokens/s", "peak memory")]
    rates, states = zip(*((f"{d.tokens_per_second:,.0f}", f"{d.state_bytes / 1000:,.1f}") for d in decoded))
    return [*training, *rates, *states]


def report(results: list[Result], options: argparse.Namespace, command: str) -> None:
    """Time decoding, print the table, and write it as Markdown and JSON, with the learning curves, into the output."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    decoded = {result.name: decodings(Path(result.folder), options, device) for result in results}
    columns = heads(options.contexts)
    rows = [row(name, result, decoded[result.name]) for result, name in zip(results, short_names(results))]
    what = f"held-out text after {results[0].tokens:,} tokens; {options.rows} rows decode at a time"
    table = Table(*columns, title=what, title_justify="left")
    for cells in rows:
        table.add_row(*cells)
    Console(width=160).print(table)
    records = [r.record() | {"decoding": [dataclasses.asdict(d) for d in decoded[r.name]]} for r in results]
    written = f"{describe_machine(device)}; {what}.\n\n`{command}`\n\n{markdown_table(columns, rows)}"
    write_text_atomic(options.output / "causal_models.md", written)
    write_text_atomic(options.output / "causal_models.json", json.dumps(records, indent=2) + "\n")
    save_figure(draw_losses(results), options.output / "causal_models.png")
    for suffix in ("md", "json", "png"):
        print(options.output / f"causal_models.{suffix}")


def main(arguments: list[str]) -> None:
    """Parse arguments, train, decode, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE.yaml or key=value")
    parser.add_argument("--tokens", type=int, help="that each model reads; without it, the files' max_duration")
    parser.add_argument("--output", type=Path, default=Path("runs/causal-compare"))
    parser.add_argument("--contexts", nargs="+", type=int, default=[512, 16384])
    parser.add_argument("--rows", type=int, default=32, help="rows that decode at a time")
    parser.add_argument("--steps", type=int, default=32, help="decoding steps to time")
    options = parser.parse_intermixed_args(arguments)
    files = [text for text in options.files if "=" not in text] or sorted(map(str, FILES.glob("*.yaml")))
    overrides = [text for text in options.files if "=" in text]
    if options.tokens is not None:
        overrides.append(f"max_duration={duration(files, overrides, options.tokens)}")
    runs = plan_runs(files, overrides)
    check_comparable(runs)
    results = best_first(train_runs(runs, Console()))
    if results:
        report(results, options, shlex.join(["python", "benchmarks/causal_models.py", *arguments]))
    raise_for_failed(runs, results)


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
