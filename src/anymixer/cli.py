"""`anymixer`: small commands around the training programs."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from anymixer.entry_point import run
from anymixer.errors import UserError

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)


report = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Pictures and tables of runs and data.")
app.add_typer(report, name="report")


@app.callback()
def describe() -> None:
    """Pretrain, fine-tune and compare language models whose sequence mixer is a choice."""


@app.command()
def mixers(
    module: Annotated[list[str] | None, typer.Option(help="a file or module of yours to list as well")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="check what the modules' mixers owe, at their defaults")
    ] = False,
) -> None:
    """List the sequence mixers that a YAML file may name, with their options and defaults."""
    from dataclasses import MISSING, fields

    from rich.console import Console
    from rich.table import Table

    from anymixer.mixers import mixers as registry
    from anymixer.mixers.plugins import load_all_installed, load_module, origin

    own = [(name, m) for m in module or [] for name in load_module(registry, m, "--module")]
    if check:
        _check(own)
        return
    failed = load_all_installed(registry)
    table = Table("name", "direction", "what it is", "options", "from")
    for name in registry.names():
        cls = registry.get(name)
        options = [f"{f.name}={f.default}" for f in fields(cls.Config) if f.default is not MISSING]
        summary = (cls.__doc__ or "").strip().split("\n")[0]
        both = "either" if "causal" in {f.name for f in fields(cls.Config)} else "both"
        direction = "causal" if cls.Config.ALWAYS_CAUSAL else both
        table.add_row(name, direction, summary, ", ".join(options), origin(cls))
    Console().print(table)
    for reason in failed.values():
        print(f"left out: {reason}")


def _check(own: list[tuple[str, str]]) -> None:
    """Print what each (name, module) keeps and breaks of a mixer's contract."""
    from anymixer.mixers.contract import check_contract

    if not own:
        raise UserError("--check: nothing to check; name a file that registers a mixer: --module my_mixer.py --check")
    broken = 0
    for name, module in own:
        print(f"{name} ({module})")
        for promise, problem in check_contract({"name": name, "module": module}).items():
            broken += problem is not None
            print(f"  {'ok    ' if problem is None else 'BROKEN'} {promise}{'' if problem is None else ': ' + problem}")
    if broken:
        raise UserError(f"--check: {broken} broken")


@app.command("fill-mask")
def fill_mask(
    checkpoint: Annotated[str, typer.Argument(help="a run's folder, a checkpoint of any kind, or a URL of one")],
    texts: Annotated[list[str] | None, typer.Argument(help="texts with [MASK] in them")] = None,
    examples: Annotated[int, typer.Option(help="take this many held-out sentences instead of texts")] = 0,
    top: Annotated[int, typer.Option(help="words to show for each mask")] = 3,
) -> None:
    """Show what a trained model puts in place of [MASK].

    anymixer fill-mask runs/demo-hydra "The function returns a [MASK] of strings."
    """
    from anymixer.fill_mask import fill_and_print

    fill_and_print(checkpoint, texts or [], examples=examples, top=top)


@app.command()
def generate(
    checkpoint: Annotated[str, typer.Argument(help="a run's folder, a checkpoint of any kind, or a URL of one")],
    prompt: Annotated[list[str] | None, typer.Option(help="text to continue; may be given several times")] = None,
    n_samples: Annotated[int, typer.Option(help="samples of each prompt, or of held-out prefixes without one")] = 1,
    l_sample: Annotated[int, typer.Option(help="tokens to generate")] = 64,
    l_prefix: Annotated[int, typer.Option(help="tokens of a held-out prefix")] = 16,
    temperature: Annotated[float, typer.Option(help="0 always takes the likeliest token")] = 1.0,
    top_k: Annotated[int, typer.Option(help="sample among the k likeliest tokens; 0 for all")] = 0,
    top_p: Annotated[float, typer.Option(help="sample among the likeliest tokens that make up this share")] = 1.0,
    seed: Annotated[int, typer.Option(help="of the sampling")] = 0,
    output: Annotated[Path | None, typer.Option(help="file to save the samples in, as JSON lines")] = None,
) -> None:
    """Sample from a trained causal language model; the likeliest samples come first.

    anymixer generate runs/demo-causal-hgrn2 --prompt "The function returns" --n-samples 4 --temperature 0.8
    """
    from anymixer.generate import SamplingOptions, generate_and_print

    options = SamplingOptions(max_new_tokens=l_sample, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    generate_and_print(checkpoint, prompt or [], n_samples=n_samples, l_prefix=l_prefix, options=options, output=output)


@app.command()
def compare(
    files: Annotated[list[str], typer.Argument(help="YAML files, and key=value to set on top of each")],
    output: Annotated[Path, typer.Option(help="folder for the results and the plot")] = Path("runs/compare"),
    ranks: Annotated[int, typer.Option(help="processes that share each run's batch")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be trained, and stop")] = False,
) -> None:
    """Train YAML files one after the other and print one table; started again, it continues.

    anymixer compare yamls/demo/mixers/*.yaml max_duration=40ba
    """
    from anymixer.compare import compare as compare_runs

    overrides = [text for text in files if "=" in text]
    compare_runs([text for text in files if "=" not in text], overrides, output, ranks=ranks, dry_run=dry_run)


@app.command("import")
def import_(
    source: Annotated[str, typer.Argument(help="file of weights, Hugging Face folder, or a name on the Hub")],
    out: Annotated[Path, typer.Argument(help="folder to make; it will look like a run's")],
    config: Annotated[Path | None, typer.Option(help="the model's config.json, where none lies beside it")] = None,
    tokenizer: Annotated[str | None, typer.Option(help="its tokenizer, where none lies beside it")] = None,
) -> None:
    """Make a run's folder of a published Hydra, a MosaicBERT, a BERT, a Doge, or an exported model of ours.

    anymixer import bert-base-uncased runs/bert
    """
    from anymixer.export.import_checkpoint import import_checkpoint

    for line in import_checkpoint(source, out, config_file=config, tokenizer_name=tokenizer):
        print(line)


@app.command()
def export(
    checkpoint: Annotated[str, typer.Argument(help="a run's folder, a checkpoint of any kind, or a URL of one")],
    out: Annotated[Path, typer.Argument(help="folder to make; it appears when it has been verified")],
    onnx: Annotated[bool, typer.Option("--onnx", help="add model.onnx, checked with onnxruntime")] = False,
    license: Annotated[str | None, typer.Option(help="for the model card, by its name on the Hub")] = None,
    push: Annotated[str | None, typer.Option(help="repository on the Hub (made private) to upload it to")] = None,
) -> None:
    """Write a checkpoint as a Hugging Face folder that loads anywhere, without this package.

    anymixer export runs/demo-hydra exported/demo_hydra
    """
    from anymixer.export.export_checkpoint import export_checkpoint
    from anymixer.export.push import check_push, push_folder

    if push is not None:
        check_push(push)
    print(export_checkpoint(checkpoint, out, onnx=onnx, license=license).describe())
    if push is not None:
        print(push_folder(out, push))


@app.command("inspect")
def inspect_command(
    checkpoint: Annotated[str, typer.Argument(help="a run's folder, a checkpoint of any kind, or a URL of one")],
) -> None:
    """Say what a checkpoint is: model, run, tokenizer, packages, parameters, losses.

    anymixer inspect runs/demo-hydra
    """
    from anymixer.inspect_checkpoint import inspect_checkpoint

    inspect_checkpoint(checkpoint)


@report.command("matrices")
def report_matrices(
    runs: Annotated[list[Path], typer.Argument(help="folders that main.py saved its checkpoints in")],
    text: Annotated[str | None, typer.Option(help="the sentence to mix")] = None,
    output: Annotated[Path, typer.Option(help="folder for the pictures and their index")] = Path("runs/matrices"),
) -> None:
    """Draw the mixing matrices of trained models on a sentence, at initialization and after training."""
    from anymixer.report.matrices import DEFAULT_TEXT
    from anymixer.report.matrices import report_matrices as draw

    for path in draw(runs, output, text or DEFAULT_TEXT):
        print(path)


@report.command("data")
def report_data(
    folder: Annotated[Path, typer.Argument(help="data folder, as python -m data_prep.convert writes it")],
    output: Annotated[Path | None, typer.Option(help="folder for the report")] = None,
) -> None:
    """Say what a data folder holds."""
    from anymixer.report.data import report_data as describe_data

    describe_data(folder, output)


def main() -> None:
    """The console script."""
    sys.exit(run(_call, sys.argv[1:]))


def _call(arguments: list[str]) -> None:
    """Run a sub-command; what is wrong with the command line is a mistake like any other."""
    try:
        app(arguments, standalone_mode=False)
    except Exception as error:
        # Usage errors are click's, of which some versions of typer bring a copy of their own.
        if not hasattr(error, "format_message"):
            raise
        command = getattr(getattr(error, "ctx", None), "command_path", "anymixer")
        raise UserError(f"{command}: {error.format_message()} (see {command} --help)") from None  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
