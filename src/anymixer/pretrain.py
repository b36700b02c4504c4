"""A pretraining run from start to end: check, build, train, evaluate, say where everything lies."""

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anymixer.config import PretrainConfig, dump_config
from anymixer.data import (
    build_eval_loaders,
    build_loader,
    check_batch_size,
    check_data,
    load_tokenizer,
    read_manifest,
)
from anymixer.errors import UserError
from anymixer.files import check_folder, write_text_atomic
from anymixer.mixers.plugins import absolute_modules, module_files
from anymixer.models import build_model
from anymixer.training.run_metrics import evaluation, summarize

if TYPE_CHECKING:
    from composer import Trainer
    from rich.table import Table
    from transformers import PreTrainedTokenizerFast

    from anymixer.training.run_record import RunRecord

CONFIG_NAME = "config.yaml"
TOKENIZER_NAME = "tokenizer"
SUMMARY_NAME = "summary.json"
# Keys that change what a run prints and nothing that it computes.
DISPLAY_KEYS = ("progress_bar", "log_to_console", "console_log_interval", "python_log_level")


def check_run(config: PretrainConfig) -> "PreTrainedTokenizerFast":
    """Check, before any work, everything that needs neither a device nor a model; return the tokenizer.

    Raises UserError for data that is missing or broken or does not fill a global batch, a tokenizer that cannot be
    found or is larger than the model's vocabulary, rows longer than the model's positions, and a checkpoint to start
    from that cannot be loaded.
    """
    for key, loader, train in (
        ("train_loader", config.train_loader, True),
        ("eval_loader", config.eval_loader, False),
    ):
        check_data(loader.resolved(train=train), key, rows=_row_flags(config))
    check_batch_size(
        config.train_loader.resolved(train=True), config.global_train_batch_size, "global_train_batch_size"
    )
    tokenizer = load_tokenizer(config.tokenizer_name)
    vocab_size = config.model.vocab_size()
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"model.model_config.vocab_size: {vocab_size} is smaller than the {len(tokenizer)} tokens of "
            f"{config.tokenizer_name}; set it to {-(-len(tokenizer) // 8) * 8}"
        )
    manifest = read_manifest(config.data_local) if config.data_local else None
    if config.model.name == "hf_bert" and (manifest or {}).get("mode") == "packed":
        raise UserError(
            f"model.name: hf_bert cannot keep the sequences of a packed row apart ({config.data_local}); "
            "use mixer_bert with the attention mixer"
        )
    for key, limit in config.model.row_limits().items():
        if config.max_seq_len > limit:
            raise UserError(f"max_seq_len: {config.max_seq_len} is longer than {key} = {limit}")
    if config.load_path is not None:
        _check_load_path(config, config.load_path)
    return tokenizer


def _check_load_path(config: PretrainConfig, load_path: str) -> None:
    """Raise UserError where it cannot be loaded, unless `autoresume` will go first."""
    from anymixer.training.checkpoints import check_load_path, list_checkpoints, named_checkpoint
    from anymixer.training.launch import save_folder, saves_shards

    folder = save_folder(config)
    if not (config.autoresume and folder is not None and list_checkpoints(folder)):
        check_load_path(named_checkpoint(load_path), sharded=saves_shards(config))


def _row_flags(config: PretrainConfig) -> str:
    """The flags of `data_prep.convert` that make rows for this run."""
    folder, tokenizer = config.data_local, Path(config.tokenizer_name)
    vocabulary = f"--tokenizer {shlex.quote(config.tokenizer_name)}"
    if folder and tokenizer.is_relative_to(folder) and not tokenizer.exists():  # is made with the rows
        vocabulary = f"--train_tokenizer {config.model.vocab_size()}"
    # hf_bert cannot keep the sequences of a packed row apart.
    mode = "--sequence_tokens" if config.model.name == "hf_bert" else "--pack_tokens"
    return f"{vocabulary} {mode} {config.max_seq_len}"


def pretrain(config: PretrainConfig) -> None:
    """Train as `config` says. Raises UserError for mistakes, all of them before any work, and SystemExit when another
    rank is lost."""
    tokenizer = check_run(config)
    # Composer takes seconds to import, so mistakes are found first.
    from anymixer.training.rank_watch import ends_told

    with ends_told():
        _run(config, tokenizer)


def _run(config: PretrainConfig, tokenizer: "PreTrainedTokenizerFast") -> None:
    """Build, train, evaluate, report."""
    from anymixer.training.launch import save_folder
    from anymixer.training.run_record import RunRecord
    from anymixer.training.trainer import fit

    folder, digest = save_folder(config), config_digest(config)
    if folder is not None:
        check_folder(folder, "save_folder")
    record = RunRecord(folder)
    trainer = _build_trainer(config, tokenizer, record)
    if folder is not None:
        _save_beside_checkpoints(config, tokenizer, folder)
    with _closing(trainer, config, folder):
        if config.eval_first and trainer.state.timestamp.batch == 0:
            _evaluate(trainer, config)
        # So that what is there after training is no earlier evaluation's.
        trainer.state.eval_metric_values = {}
        fit(trainer)
        after = _latest_metrics(trainer) or _evaluate(trainer, config)
    results = {
        "steps": int(trainer.state.timestamp.batch),
        "before": evaluation(record.lines, 0) if config.eval_first else None,
        "after": after,
        "unigram_entropy_nats": _unigram_entropy(config),
        "parameters": sum(p.numel() for p in trainer.state.model.parameters()),
        **summarize(record.lines),
        "config_sha256": digest,
    }
    _report(config, results, folder)


def saved_config(config: PretrainConfig) -> PretrainConfig:
    """The configuration as the run's folder keeps it: with the files of the user's own mixers as absolute paths."""
    model = dataclasses.replace(config.model, mixer=absolute_modules(config.model.mixer))
    return dataclasses.replace(config, model=model)


def config_digest(config: PretrainConfig) -> str:
    """SHA-256 over the configuration, less DISPLAY_KEYS, and the files of the user's own mixers: results that carry
    it belong to this configuration."""
    display = {key: getattr(type(config), key) for key in DISPLAY_KEYS}
    digest = hashlib.sha256(dump_config(dataclasses.replace(saved_config(config), **display)).encode())
    for file in module_files(config.model.mixer):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def _build_trainer(config: PretrainConfig, tokenizer: "PreTrainedTokenizerFast", record: "RunRecord") -> "Trainer":
    """Model, loaders and Trainer of this rank."""
    from composer.utils import reproducibility

    from anymixer.training.launch import initialize_distributed, plan_launch
    from anymixer.training.made_with import made_with
    from anymixer.training.run_callbacks import say
    from anymixer.training.trainer import build_trainer

    plan = plan_launch(config)
    initialize_distributed(plan, config)
    # The same weights on every rank, and for every number of ranks.
    reproducibility.seed_all(config.seed)
    model = build_model(config.model)
    say(f"{config.run_name}: {sum(p.numel() for p in model.parameters()):,} parameters")
    size, eval_size = plan.device_train_batch_size, plan.device_eval_batch_size
    loaders = (
        build_loader(config.train_loader, tokenizer, device_batch_size=size, seed=config.seed, train=True),
        build_eval_loaders(config.eval_loader, tokenizer, device_batch_size=eval_size, seed=config.seed),
    )
    hparams = dataclasses.asdict(config) | {"made_with": made_with(tokenizer)}
    return build_trainer(config, model, tokenizer, *loaders, extra_callbacks=[record], hparams=hparams)


@contextlib.contextmanager
def _closing(trainer: "Trainer", config: PretrainConfig, folder: Path | None) -> Iterator[None]:
    """Close the trainer at the end of the block, and say in one line why it ended where it did not finish."""
    from anymixer.training.run_callbacks import say

    try:
        yield
    except (KeyboardInterrupt, SystemExit):  # Composer turns Ctrl-C and SIGTERM into the latter
        say("\n" + _interrupted(trainer, config, folder))  # below the progress bar
        raise
    except RuntimeError as error:
        # A cluster's SIGTERM reaches the loader's workers too, and torch may notice theirs first.
        if "signal: Terminated" not in str(error):
            raise
        say("\n" + _interrupted(trainer, config, folder))  # below the progress bar
        raise SystemExit(128 + signal.SIGTERM) from error
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise UserError(
            f"save_folder: no space left for checkpoints in {folder}; make room and start the same command again"
        ) from error
    finally:
        trainer.close()


def _save_beside_checkpoints(config: PretrainConfig, tokenizer: "PreTrainedTokenizerFast", folder: Path) -> None:
    """Put the resolved configuration and the tokenizer next to the checkpoints (rank 0)."""
    from composer.utils import dist

    if dist.get_global_rank() == 0:
        write_text_atomic(folder / CONFIG_NAME, dump_config(saved_config(config)))
        tokenizer.save_pretrained(str(folder / TOKENIZER_NAME))
    dist.barrier()


def _interrupted(trainer: "Trainer", config: PretrainConfig, folder: Path | None) -> str:
    """What to say of a run that was asked to stop."""
    step = int(trainer.state.timestamp.batch)
    if folder is None:
        return f"interrupted at step {step}; without save_folder, nothing was saved"
    if not config.autoresume:
        return f"interrupted at step {step}; checkpoints are in {folder}; continue with autoresume=true"
    return f"interrupted at step {step}; start the same command again to continue from the last checkpoint in {folder}"


def _evaluate(trainer: "Trainer", config: PretrainConfig) -> dict[str, Any]:
    trainer.eval(subset_num_batches=config.eval_subset_num_batches)
    return _latest_metrics(trainer)


def _latest_metrics(trainer: "Trainer") -> dict[str, Any]:
    from anymixer.training.evaluation import latest_evaluation

    return latest_evaluation(trainer.state)


def _report(config: PretrainConfig, results: dict[str, Any], folder: Path | None) -> None:
    """Print what was reached and where everything lies, and keep it as JSON beside the checkpoints (rank 0)."""
    from composer.utils import dist
    from rich.console import Console

    if dist.get_global_rank() != 0:
        return
    Console().print(_results_table(config, results))
    for what, where in places(config, folder).items():
        print(f"{what:<12} {where}")
    if folder is not None:
        write_text_atomic(folder / SUMMARY_NAME, json.dumps(results, indent=2) + "\n")


def _results_table(config: PretrainConfig, results: dict[str, Any]) -> "Table":
    from rich.table import Table

    before, after, entropy = (results[key] for key in ("before", "after", "unigram_entropy_nats"))
    table = Table(title=f"{config.run_name}: held-out text after {results['steps']:,} steps", title_justify="left")
    for column in ("", *(["before"] if before else []), "after"):
        table.add_column(column, justify="right" if column else "left")
    columns = [before, after] if before else [after]
    blank = [""] * (len(columns) - 1)
    causal = config.model.name == "causal_lm"
    task = "next-token" if causal else "masked-LM"
    table.add_row(f"{task} loss (nats)", *(f"{m['loss']:.3f}" for m in columns))
    if causal:
        table.add_row("perplexity", *(f"{math.exp(m['loss']):,.1f}" for m in columns))
    table.add_row(f"{task} accuracy", *(f"{m['accuracy']:.1%}" for m in columns))
    if entropy is not None:
        table.add_row("unigram entropy (nats)", *blank, f"{entropy:.3f}")
        if after["loss"] < entropy:
            table.add_row("loss below it", *blank, f"{entropy - after['loss']:.3f}")
    return table


def places(config: PretrainConfig, folder: Path | None) -> dict[str, str]:
    """What the report names, and where it is: the checkpoint only where there is one."""
    from anymixer.training.checkpoints import LATEST

    found = {"data": str(config.data_local)}
    if folder is not None:
        if (folder / LATEST).exists():
            found["checkpoint"] = str(folder / LATEST)
        found |= {
            "tokenizer": str(folder / TOKENIZER_NAME),
            "config": str(folder / CONFIG_NAME),
            "summary": str(folder / SUMMARY_NAME),
        }
    return found


def _unigram_entropy(config: PretrainConfig) -> float | None:
    """Loss in nats of always predicting the words' frequencies, where the data's manifest knows it."""
    manifest = read_manifest(config.data_local) if config.data_local else None
    value = (manifest or {}).get("unigram_entropy_nats")
    return None if value is None else float(value)
