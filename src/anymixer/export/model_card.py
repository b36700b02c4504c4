"""The README of an exported model: how to use it, what it is, what it was trained on and what came of it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anymixer
from anymixer.data import read_manifest
from anymixer.errors import UserError
from anymixer.training.run_metrics import METRICS_NAME, evaluation, read_metrics

if TYPE_CHECKING:
    from anymixer.export.folder import ExportedModel
    from anymixer.export.source import Checkpoint

CARD_NAME = "README.md"
PICTURE_NAME = "mixing_matrices.png"
_TASKS = {
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
    "AutoModelForCausalLM": "text-generation",
}
# Of the resolved configuration: what of the recipe is worth a line; all of it follows below.
_RECIPE = (
    "max_duration",
    "global_train_batch_size",
    "max_seq_len",
    "optimizer",
    "scheduler",
    "mlm_probability",
    "seed",
)
# Where things lay on the machine that trained.
_PLACES = ("save_folder", "load_path", "run_name", "loggers")


def write_model_card(
    folder: Path, checkpoint: "Checkpoint", exported: "ExportedModel", *, name: str, license: str | None
) -> None:
    """Write README.md into `folder`, and a picture of the mixing matrices where the run's folder allows one."""
    picture = _draw(folder, checkpoint)
    parts = [
        _front_matter(exported, license),
        f"# {name}",
        _summary(checkpoint, exported),
        _usage(name, exported),
        _results(checkpoint),
        _data(checkpoint.run),
        _recipe(checkpoint.run),
        f"## Mixing matrices\n\n![mixing matrices]({PICTURE_NAME})" if picture else "",
        _made_with(checkpoint),
    ]
    (folder / CARD_NAME).write_text("\n\n".join(part for part in parts if part) + "\n", encoding="utf-8")


def _front_matter(exported: "ExportedModel", license: str | None) -> str:
    lines = [f"license: {license or 'unknown'}", "library_name: transformers", "tags:", "- anymixer"]
    if exported.auto_class in _TASKS:
        lines.append(f"pipeline_tag: {_TASKS[exported.auto_class]}")
    return "\n".join(["---", *lines, "---"])


def _summary(checkpoint: "Checkpoint", exported: "ExportedModel") -> str:
    config = exported.model.config
    parameters = sum(p.numel() for p in exported.model.parameters())
    step = checkpoint.step()
    trained = f", after {step:,} training steps" if step else ""
    text = f"`{type(exported.model).__name__}`, {parameters:,} parameters, {config.num_hidden_layers} layers of width "
    text += f"{config.hidden_size}{trained}."
    if hasattr(config, "mixer"):
        text += f"\n\nSequence mixer:\n\n```json\n{json.dumps(config.mixer, indent=2)}\n```"
    return text


def _usage(name: str, exported: "ExportedModel") -> str:
    auto, code = exported.auto_class, exported.code is not None
    trust = ", trust_remote_code=True" if code else ""
    needs = f" {' '.join(exported.requirements)}" if exported.requirements else ""
    lines = [
        f"## Use\n\n`pip install torch transformers{needs}`, and then:\n\n```python",
        f"from transformers import {auto}, AutoTokenizer",
        "",
        f'tokenizer = AutoTokenizer.from_pretrained("{name}"{trust})',
        f'model = {auto}.from_pretrained("{name}"{trust})',
        'logits = model(**tokenizer("Some text.", return_tensors="pt")).logits',
        "```",
    ]
    if code:
        lines.append("\nThe code is in this folder; it needs PyTorch and transformers 4.51 or newer, and no GPU.")
    return "\n".join(lines)


def _results(checkpoint: "Checkpoint") -> str:
    """Held-out loss and accuracy at the checkpoint's step, where the run wrote them down."""
    metrics, step = checkpoint.folder / METRICS_NAME, checkpoint.step()
    figures = evaluation(read_metrics(metrics), step) if step is not None and metrics.is_file() else None
    if figures is None:
        return ""
    rows = {"all": figures} | (figures.get("streams") or {})
    lines = [f"| {stream} | {row['loss']:.4f} | {row['accuracy']:.2%} |" for stream, row in rows.items()]
    head = ["## Held-out text", "", "| data | loss (nats per predicted token) | accuracy |", "|---|---|---|"]
    return "\n".join([*head, *lines])


def _data(run: Mapping[str, Any]) -> str:
    """What the manifest of the training data says."""
    place = run.get("data_local")
    manifest = read_manifest(place) if place and Path(place).is_dir() else None
    if not manifest or "splits" not in manifest:
        return ""
    columns = ("dataset", "documents", "tokens")
    lines = [
        "| " + " | ".join([split, *(_figure(said.get(column)) for column in columns)]) + " |"
        for split, said in manifest["splits"].items()
    ]
    head = ["## Training data", "", "| split | dataset | documents | tokens |", "|---|---|---|---|"]
    return "\n".join([*head, *lines])


def _figure(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value if value is not None else "")


def _recipe(run: Mapping[str, Any]) -> str:
    if not run:
        return ""
    lines = [f"| {key} | `{json.dumps(run[key])}` |" for key in _RECIPE if run.get(key) is not None]
    everything = json.dumps({key: value for key, value in run.items() if key not in _PLACES}, indent=2, sort_keys=True)
    details = f"<details><summary>All keys</summary>\n\n```json\n{everything}\n```\n\n</details>"
    return "\n".join(["## Recipe", "", "| key | value |", "|---|---|", *lines, "", details])


def _made_with(checkpoint: "Checkpoint") -> str:
    packages = checkpoint.made_with.get("packages", {})
    trained = (
        f" Trained with {', '.join(f'{name} {version}' for name, version in packages.items())}." if packages else ""
    )
    return f"Exported by anymixer {anymixer.__version__}.{trained}"


def _draw(folder: Path, checkpoint: "Checkpoint") -> bool:
    """Draw the matrices of the run's model on a sentence; only a run's own folder says how its model began."""
    from anymixer.pretrain import CONFIG_NAME
    from anymixer.report.figures import save_figure
    from anymixer.report.matrices import DEFAULT_TEXT, draw_matrices, run_matrices

    if not (checkpoint.folder / CONFIG_NAME).is_file() or checkpoint.tokenizer is None:
        return False
    room = int(checkpoint.run.get("max_seq_len") or 0) - 2
    words = DEFAULT_TEXT.split()
    while words and len(checkpoint.tokenizer.tokenize(" ".join(words))) > room:
        words.pop()
    try:
        picture = draw_matrices(run_matrices(checkpoint.folder, " ".join(words)))
    except UserError:  # a model without mixers, or a folder whose latest checkpoint is another kind
        return False
    save_figure(picture, folder / PICTURE_NAME)
    return True
