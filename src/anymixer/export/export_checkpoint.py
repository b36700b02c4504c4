"""`anymixer export`: a checkpoint as a folder that loads anywhere, checked before it gets its name."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from anymixer.errors import UserError
from anymixer.export.folder import ExportedModel, build_exported, longest_row, write_folder
from anymixer.export.model_card import write_model_card
from anymixer.export.new_folder import new_folder
from anymixer.export.sample_rows import SENTENCES, arbitrary_rows, held_out_rows, sentence_rows
from anymixer.export.source import Checkpoint, open_checkpoint
from anymixer.export.verify import TOLERANCE, Expected, Verdict, verify


@dataclass
class Export:
    """What was exported: where to, the name in transformers that loads it, and how it was compared."""

    folder: Path
    auto_class: str
    difference: float
    rows: int
    held_out: bool

    def describe(self) -> str:
        """One line for the end of the command."""
        text = f"{self.rows} rows of {'held-out text' if self.held_out else 'text'}"
        return (
            f"{self.folder}: {self.auto_class}, loaded without anymixer; on {text} its outputs differ by "
            f"{self.difference:.1g} at most (allowed: {TOLERANCE:g})"
        )


def export_checkpoint(
    source: str,
    out: Path,
    *,
    onnx: bool = False,
    license: str | None = None,
    say: Callable[[str], None] = print,
) -> Export:
    """Write the checkpoint that `source` names (see `open_checkpoint`) into the new folder `out`.

    The folder is written beside `out` and loaded in a fresh process without this package. `out` appears only when what
    it gives there are the checkpoint's own outputs; otherwise it is kept as `out`.failed.

    onnx: write `model.onnx` too. license: for the model card, by the name that the Hugging Face Hub knows. say: takes
    lines for the user.
    Raises UserError, and leaves nothing else behind, when `out` exists or the checkpoint cannot be exported.
    """
    check_out(out)
    checkpoint = open_checkpoint(source)
    model = build_exported(checkpoint)
    if model.tokenizer is None:
        say(f"{source}: no tokenizer is in it or beside it; the folder will have none")
    with new_folder(out) as folder:
        write_folder(model, folder)
        write_model_card(folder, checkpoint, model, name=out.name, license=license)
        expected, held_out = expectation(folder, checkpoint, model)
        if onnx:
            from anymixer.export.onnx_model import ONNX_NAME, write_onnx

            write_onnx(model.model, folder / ONNX_NAME, expected.rows)
        verdict = verify([expected], model.blocked)[0]
        if verdict.problem is not None:
            raise UserError(_failed(folder, out, verdict))
    return Export(out, model.auto_class, verdict.difference, len(expected.rows), held_out)


def check_out(out: Path) -> None:
    """Raise UserError for a folder that is there already, or that transformers could not load code from."""
    if out.exists() or out.is_symlink():
        raise UserError(f"{out}: it is there already, and is left as it is; name a folder that is not")
    if "." in out.name:
        raise UserError(
            f"{out}: transformers 4 loads no code from a folder with a dot in its name; "
            f"name it {out.name.replace('.', '_')}"
        )


def expectation(folder: Path, checkpoint: Checkpoint, model: ExportedModel) -> tuple[Expected, bool]:
    """What to compare, and whether it is text that the run was evaluated on."""
    limit = longest_row(model.model)
    tokenizer = model.tokenizer
    if tokenizer is None:
        rows = arbitrary_rows(model.model.config.vocab_size)
        return Expected(folder, model.model, model.auto_class, [row[:limit] for row in rows]), False
    held_out = held_out_rows(checkpoint.run, tokenizer)
    sentences = sentence_rows(tokenizer)
    rows = [row[:limit] for row in [*held_out, *sentences] if row]
    return Expected(folder, model.model, model.auto_class, rows, list(SENTENCES), sentences), bool(held_out)


def _failed(folder: Path, out: Path, verdict: Verdict) -> str:
    """Keep a folder that failed beside `out`; return what to say."""
    target, number = out.with_name(f"{out.name}.failed"), 2
    while target.exists():
        target, number = out.with_name(f"{out.name}.failed-{number}"), number + 1
    os.rename(folder, target)
    return f"{out}: not exported: {verdict.problem}; what was written is in {target}"
