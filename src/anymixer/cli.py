"""`anymixer`: small commands around the training programs."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from anymixer.entry_point import run

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.callback()
def describe() -> None:
    """Pretrain, fine-tune and compare language models whose sequence mixer is a choice."""


@app.command()
def mixers() -> None:
    """List the sequence mixers that a YAML file may name, with their options and defaults."""
    from dataclasses import MISSING, fields

    from rich.console import Console
    from rich.table import Table

    from anymixer.mixers import mixers as registry

    table = Table("name", "direction", "what it is", "options")
    for name in registry.names():
        cls = registry.get(name)
        options = [f"{f.name}={f.default}" for f in fields(cls.Config) if f.default is not MISSING]
        summary = (cls.__doc__ or "").strip().split("\n")[0]
        table.add_row(name, "causal" if cls.causal else "both", summary, ", ".join(options))
    Console().print(table)


@app.command("fill-mask")
def fill_mask(
    run_folder: Annotated[Path, typer.Argument(help="folder that main.py saved its checkpoints in")],
    texts: Annotated[list[str] | None, typer.Argument(help="texts with [MASK] in them")] = None,
    examples: Annotated[int, typer.Option(help="take this many held-out sentences instead of texts")] = 0,
    top: Annotated[int, typer.Option(help="words to show for each mask")] = 3,
) -> None:
    """Show what a trained model puts in place of [MASK].

    anymixer fill-mask runs/demo-hydra "The function returns a [MASK] of strings."
    """
    from anymixer.fill_mask import fill_and_print

    fill_and_print(run_folder, texts or [], examples=examples, top=top)


def main() -> None:
    """The console script."""
    sys.exit(run(lambda arguments: app(arguments, standalone_mode=False), sys.argv[1:]))
