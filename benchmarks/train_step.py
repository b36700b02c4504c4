"""Time whole training steps (forward, backward, fused AdamW) of YAML models against the attention baseline.

    python benchmarks/train_step.py yamls/demo/hydra.yaml --tokens 4096
    python benchmarks/train_step.py yamls/pretrain/hydra.yaml yamls/pretrain/hf_bert.yaml --tokens 32768

The baseline, yamls/pretrain/bert.yaml at the first file's width, depth and vocabulary, runs first. No padding, 30 %
of the tokens masked, float32 parameters, bfloat16 autocast on a GPU. MFU counts 6 operations per matrix
parameter and token (the vocabulary's only at masked tokens) over the matrix-product rate measured in the run.
"""

import argparse
import contextlib
import copy
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from timing import Measurement, measure, print_header

from anymixer.config import load_config
from anymixer.models import ModelConfig, build_model
from anymixer.training.composer_model import matrix_weights

BASELINE = Path(__file__).parents[1] / "yamls" / "pretrain" / "bert.yaml"
MASKED = 0.30


def bench_step(
    config: ModelConfig, options: argparse.Namespace, length: int, device: torch.device
) -> tuple[Measurement, float]:
    """Median time of one step, and the floating-point operations of its matrix products."""
    torch.manual_seed(0)
    model = build_model(config).to(device).train()
    vocab_size = model.config.vocab_size
    ids = torch.randint(5, vocab_size, (options.tokens // length, length), device=device)
    labels = torch.where(torch.rand(ids.shape, device=device) < MASKED, ids, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=device.type == "cuda")
    call = torch.compile(model, mode=options.mode) if options.compile else model
    autocast = torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast:
            loss = call(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()

    body, head = matrix_weights(model)
    flops = 6.0 * (body * ids.numel() + head * int((labels != -100).sum()))
    return measure(step, device, repeat=options.repeat), flops


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


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", metavar="FILE.yaml")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--lengths", nargs="+", type=int, default=[128])
    parser.add_argument("--repeat", type=int, default=10)
    parser.add_argument("--compile", action="store_true", help="torch.compile every model")
    parser.add_argument("--mode", default="default", help="of torch.compile: reduce-overhead for CUDA graphs")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compiled = f", compiled ({options.mode})" if options.compile else ""
    found = print_header(device, f"{options.tokens:,} tokens a step, median of {options.repeat}{compiled}")
    models = {str(file): load_config(file).model for file in options.files}
    models = {"attention baseline": baseline_like(next(iter(models.values()))), **models}
    table = Table("length", "model", "step ms", "Mtok/s", "x baseline speed", "MFU", "peak GiB")
    for length in options.lengths:
        baseline = None
        for name, config in models.items():
            time, flops = bench_step(config, options, length, device)
            baseline = baseline or time
            table.add_row(
                str(length),
                name,
                f"{time.milliseconds:.1f}",
                f"{options.tokens / time.milliseconds / 1e3:.4f}",
                f"{baseline.milliseconds / time.milliseconds:.2f}",
                f"{flops / time.milliseconds / 1e9 / found['matmul_tflops']:.0%}",
                f"{time.peak_gib:.2f}",
            )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
