"""Time whole training steps (forward, backward, fused AdamW) of YAML models against the attention baseline.

    python benchmarks/train_step.py yamls/demo/hydra.yaml --tokens 4096
    python benchmarks/train_step.py yamls/pretrain/hydra.yaml --tokens 32768 --launch eager graphs compiled \\
        --peers mamba_ssm hf_bert modernbert --markdown steps.md

The baseline, yamls/pretrain/bert.yaml at the first file's width, depth and vocabulary, runs first. Peers: the first
file's model with the backend mamba_ssm, transformers' own BERT-base and ModernBERT-base. No padding, 30 % of the
tokens masked, float32 parameters, bfloat16 autocast on a GPU. By the wall clock: where launching a step's kernels takes
the host longer than the device takes to run them, that is what a step costs. Peak memory is what was allocated, for
graphs what was reserved. `--profile` names the kernels that take most of one step. MFU counts 6 operations per matrix
parameter and token (the vocabulary's only at masked tokens) over the matrix-product rate measured in the run.
"""

import argparse
import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from anymixer_kernels import backend, force_backend
from timing import (
    Measurement,
    autocast,
    free_memory,
    header_lines,
    largest_costs,
    measure,
    print_header,
    report,
    told,
    write_markdown,
)

from anymixer.config import load_config
from anymixer.entry_point import run as run_program
from anymixer.errors import UserError
from anymixer.models import ModelConfig, build_model
from anymixer.training.algorithms import ALGORITHMS
from anymixer.training.composer_model import matrix_weights
from anymixer.training.cuda_graphs import use_cuda_graphs

YAMLS = Path(__file__).parents[1] / "yamls" / "pretrain"
BASELINE = YAMLS / "bert.yaml"
MASKED = 0.30
PEERS = ("mamba_ssm", "hf_bert", "modernbert")
LAUNCHES = ("eager", "graphs", "compiled")
COLUMNS = ("model", "parameters", "length", "launch", "step ms", "Mtok/s", "x baseline speed", "MFU", "peak GiB")


def bench_step(
    build: Callable[[], Any], options: argparse.Namespace, length: int, launch: str, device: torch.device
) -> tuple[Measurement, float, int, str | None]:
    """Median time of one step, the floating-point operations of its matrix products, the model's parameters, and the
    step's largest costs where they are asked for."""
    torch.manual_seed(0)
    torch.compiler.reset()
    model = build().to(device).train()
    vocab_size = model.config.vocab_size
    ids = torch.randint(5, vocab_size, (options.tokens // length, length), device=device)
    labels = torch.where(torch.rand(ids.shape, device=device) < MASKED, ids, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")
    if options.low_precision_norms:
        lower_norms(model, optimizer)
    if launch == "graphs":
        use_cuda_graphs(model)
    call = torch.compile(model) if launch == "compiled" else model

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast(device):
            loss = call(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()

    body, head = matrix_weights(model)
    flops = 6.0 * (body * ids.numel() + head * int((labels != -100).sum()))
    time = measure(step, device, repeat=options.repeat, wall=True)
    if launch == "graphs":  # whose passes' memory torch counts as free
        time = replace(time, peak_gib=torch.cuda.memory_reserved() / 2**30)
    costs = largest_costs(step, device) if options.profile else None
    return time, flops, sum(p.numel() for p in model.parameters()), costs


def lower_norms(model: Any, optimizer: torch.optim.Optimizer) -> None:
    """Apply the algorithm low_precision_layernorm as a Trainer does at its start."""
    from composer.core import Event, Precision

    (algorithm,) = ALGORITHMS.build({"low_precision_layernorm": {}})
    state = SimpleNamespace(model=model, optimizers=(optimizer,), _precision=Precision.AMP_BF16)
    algorithm.apply(Event.INIT, state, None)


def baseline_like(config: ModelConfig) -> ModelConfig:
    """The attention encoder of BASELINE at the sizes of another model."""
    baseline = load_config(BASELINE).model
    sizes = config.hugging_face_config()
    baseline = copy.deepcopy(baseline)
    baseline.model_config |= {
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.hidden_size,
        "channel_mixer": {"name": "mlp", "intermediate_size": 4 * sizes.hidden_size},
    }
    if sizes.hidden_size != 768:
        baseline.mixer = {"name": "attention"}
        baseline.model_config["num_hidden_layers"] = sizes.num_hidden_layers
    return baseline


def modernbert() -> Any:
    """ModernBERT-base (arXiv 2412.13663) as transformers has it, random weights, not compiled unless we do."""
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    config = ModernBertConfig(attn_implementation="sdpa", reference_compile=False)
    return ModernBertForMaskedLM(config)


def models(options: argparse.Namespace, device: torch.device) -> dict[str, tuple[Callable[[], Any], str]]:
    """What to measure: name -> how it is built, and the backend it runs by."""
    configs = {file: load_config(file).model for file in options.files}
    first = next(iter(configs.values()))
    positions = max(512, *options.lengths)
    baseline = baseline_like(first)
    baseline.model_config["max_position_embeddings"] = positions
    found = {"attention baseline": baseline, **configs}
    named: dict[str, tuple[Callable[[], Any], str]] = {
        name: (partial(build_model, config), "auto") for name, config in found.items()
    }
    if "mamba_ssm" in options.peers:
        if problem := backend.mamba_ssm_problem(device.type):
            raise UserError(f"--peers: mamba_ssm: {problem}")
        named[f"{options.files[0]}, mamba_ssm"] = (partial(build_model, first), "mamba_ssm")
    if "hf_bert" in options.peers:
        bert = load_config(YAMLS / "hf_bert.yaml").model
        bert.model_config["max_position_embeddings"] = positions
        named["HF BERT-base"] = (partial(build_model, bert), "auto")
    if "modernbert" in options.peers:
        named["HF ModernBERT-base"] = (modernbert, "auto")
    return named


def bench_all(
    options: argparse.Namespace, device: torch.device, ceilings: dict[str, float], lines: list[str]
) -> Iterator[list[str]]:
    """The table's rows, one after the other; profiles are printed, and added to `lines`."""
    named = models(options, device)
    for length in options.lengths:
        for launch in options.launch:
            baseline = None
            for name, (build, form) in named.items():
                if launch == "graphs" and name.startswith("HF "):
                    continue  # no backbone of ours to record
                with force_backend(form):
                    time, flops, parameters, costs = bench_step(build, options, length, launch, device)
                free_memory()
                if costs is not None:
                    lines.append(f"one step of {name}, {length:,} tokens a row, {launch}: {costs}")
                    print(lines[-1], flush=True)
                baseline = baseline or time
                yield [
                    *(name, f"{parameters / 1e6:.1f}M", f"{length:,}", launch, f"{time.milliseconds:.1f}"),
                    f"{options.tokens / time.milliseconds / 1e3:.4f}",
                    f"{baseline.milliseconds / time.milliseconds:.2f}",
                    f"{flops / time.milliseconds / 1e9 / ceilings['matmul_tflops']:.0%}",
                    f"{time.peak_gib:.2f}",
                ]


def main(arguments: list[str]) -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE.yaml")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--lengths", nargs="+", type=int, default=[128])
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=[])
    parser.add_argument(
        "--launch", nargs="+", choices=LAUNCHES, default=["eager"], help="kernel by kernel, as CUDA graphs, compiled"
    )
    parser.add_argument("--low-precision-norms", action="store_true", help="as algorithms.low_precision_layernorm")
    parser.add_argument("--profile", action="store_true", help="name the largest costs of one step")
    parser.add_argument("--markdown", type=Path, metavar="FILE.md")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models(options, device)  # what cannot run is refused before anything is measured
    if "graphs" in options.launch and device.type != "cuda":
        raise UserError("--launch: graphs: needs a GPU")
    what = f"{options.tokens:,} tokens a step, median of {options.repeat} by the wall clock"
    ceilings = print_header(device, what)
    lines = header_lines(device, what, ceilings)
    keep = partial(write_markdown, options.markdown, COLUMNS, lines)
    rows = list(told(bench_all(options, device, ceilings, lines), keep))
    report(COLUMNS, rows, lines, options.markdown)


if __name__ == "__main__":
    sys.exit(run_program(main, sys.argv[1:]))
