"""`anymixer inspect`: what a checkpoint is and how it came about, from what it carries and what lies beside it."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from anymixer.data import tokenizer_fingerprint
from anymixer.describe import count_parameters, parameter_table
from anymixer.export.folder import build_on_meta
from anymixer.export.source import Checkpoint, open_checkpoint
from anymixer.training.run_metrics import METRICS_NAME, read_metrics

# Rows of the table of losses, and the height of the tallest bar beside them.
_LOSS_ROWS, _BAR = 12, 40


def inspect_checkpoint(source: str, console: Console | None = None) -> None:
    """Print the checkpoint that `source` names (see `open_checkpoint`).

    Raises UserError when there is none, it is broken, or its weights are not those of the model it names.
    """
    console = console or Console()
    checkpoint = open_checkpoint(source)
    model = build_on_meta(checkpoint)
    console.print(_run_table(checkpoint, type(model).__name__), _package_table(checkpoint))
    if checkpoint.run:
        console.print(_heading("Configuration"), escape(_as_yaml(checkpoint.run)), sep="\n", soft_wrap=True)
    console.print(_heading("Model"), escape(_as_yaml(_model_fields(checkpoint))), sep="\n", soft_wrap=True)
    console.print(parameter_table(model))
    console.print(f"{count_parameters(model):,} parameters")
    lines = _losses(checkpoint.folder / METRICS_NAME)
    console.print(_loss_table(lines) if lines else "no losses: there is no metrics.jsonl beside the checkpoint")


def _heading(text: str) -> str:
    return f"\n[bold]{text}[/bold]"


def _run_table(checkpoint: Checkpoint, model: str) -> Table:
    """Where the checkpoint is, and how far its run had got."""
    table = Table("checkpoint", escape(str(checkpoint.file)))
    table.columns[1].overflow = "fold"  # a hash that is cut off says nothing
    table.add_row("model", model)
    if "run_name" in checkpoint.state:
        table.add_row("run", escape(str(checkpoint.state["run_name"])))
    timestamp = checkpoint.state.get("timestamp", {}).get("Timestamp", {})
    for key, what in (("batch", "steps"), ("sample", "sequences"), ("token", "tokens"), ("epoch", "epochs")):
        if key in timestamp:
            table.add_row(what, f"{int(timestamp[key]):,}")
    if checkpoint.tokenizer is not None:
        table.add_row("tokenizer", f"{len(checkpoint.tokenizer):,} entries, SHA-256 {_tokenizer_hash(checkpoint)}")
    return table


def _tokenizer_hash(checkpoint: Checkpoint) -> str:
    """The fingerprint of the tokenizer that is there, and whether the run had another."""
    assert checkpoint.tokenizer is not None
    found, kept = tokenizer_fingerprint(checkpoint.tokenizer), checkpoint.made_with.get("tokenizer_sha256")
    return found if kept in (None, found) else f"{found}, but the run was trained with {kept}"


def _package_table(checkpoint: Checkpoint) -> Table | str:
    packages: Mapping[str, str] = checkpoint.made_with.get("packages", {})
    if not packages:
        return "no versions of packages: this checkpoint was not written by a run that keeps them"
    table = Table("package", "version it was made with")
    for name, version in packages.items():
        table.add_row(name, version)
    return table


def _model_fields(checkpoint: Checkpoint) -> dict[str, Any]:
    """The model's configuration, less what says nothing of the model."""
    hidden = ("auto_map", "transformers_version", "architectures", "_name_or_path")
    return {key: value for key, value in checkpoint.config.to_diff_dict().items() if key not in hidden}


def _as_yaml(tree: Mapping[str, Any], indent: int = 0) -> str:
    """Plain data as the YAML that a run's file could hold."""
    lines = []
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            lines += [f"{' ' * indent}{key}:", _as_yaml(value, indent + 2)]
        else:
            text = value if isinstance(value, str) and value.isprintable() and value else json.dumps(value)
            lines.append(f"{' ' * indent}{key}: {text}")
    return "\n".join(lines)


def _losses(file: Path) -> list[tuple[int, float]]:
    """(step, training loss) of every step that was written down."""
    if not file.is_file():
        return []
    return [(line["step"], line["loss"]) for line in read_metrics(file) if line.get("loss") is not None]


def _loss_table(losses: Sequence[tuple[int, float]]) -> Table:
    """The curve, at evenly spread steps: each the mean of the steps since the row before."""
    table = Table("step", "training loss (nats)", "", title="Loss")
    size = -(-len(losses) // _LOSS_ROWS)
    groups = [losses[start : start + size] for start in range(0, len(losses), size)]
    means = [(group[-1][0], sum(loss for _, loss in group) / len(group)) for group in groups]
    top = max(mean for _, mean in means)
    for step, mean in means:
        table.add_row(f"{step:,}", f"{mean:.4f}", "█" * round(_BAR * mean / top) if top > 0 else "")
    return table
