"""Build Composer's Trainer from a configuration, and run it."""

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from anymixer_kernels.backend import set_backend
from composer import Trainer
from composer.core import Callback, DataSpec, Evaluator
from composer.models import HuggingFaceModel
from composer.utils import dist
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from anymixer.errors import UserError
from anymixer.models.checkpoint_weights import RefusedCheckpoint, read_checkpoint
from anymixer.training import checkpoint_guard
from anymixer.training.algorithms import ALGORITHMS
from anymixer.training.callbacks import CALLBACKS
from anymixer.training.checkpoints import check_load_path, named_checkpoint, recover
from anymixer.training.composer_model import MixerComposerModel
from anymixer.training.cuda_graphs import use_cuda_graphs
from anymixer.training.launch import (
    LaunchPlan,
    initialize_distributed,
    plan_launch,
    save_folder,
    saves_shards,
)
from anymixer.training.loggers import LOGGERS
from anymixer.training.optimizers import build_optimizer
from anymixer.training.parallelism import build_parallelism
from anymixer.training.rank_watch import RankProgress, ends_told
from anymixer.training.run_callbacks import LaunchReport, OptimizerNumbers, RunConfig, changed_keys, say
from anymixer.training.schedulers import build_scheduler, warmup_note
from anymixer.training.step_seed import StepSeed
from anymixer.training.times import for_composer
from anymixer.training.trainer_config import TrainerConfig


def build_trainer(
    config: TrainerConfig,
    model: PreTrainedModel | HuggingFaceModel,
    tokenizer: PreTrainedTokenizerFast | None,
    train_spec: DataSpec,
    eval_spec: DataSpec | Mapping[str, DataSpec] | None = None,
    *,
    extra_callbacks: Sequence[Callback] = (),
    hparams: Mapping[str, Any] | None = None,
) -> Trainer:
    """Build the Trainer of one run, ready for `fit`; with `autoresume`, at the newest whole checkpoint.

    The loss is the mean over the masked rows of the global batch, whatever the microbatch and the ranks:
    the specs' `get_num_tokens_in_batch` must count `loss_generating` tokens, at least 1 a batch.

    Args:
        config: a validated configuration.
        model: the model, on the CPU, the same on every rank: a masked language model, or one that is wrapped for
            Composer already.
        tokenizer: stored in every checkpoint.
        train_spec: batches of `LaunchPlan.device_train_batch_size` sequences for this rank.
        eval_spec: batches of `LaunchPlan.device_eval_batch_size`, or several by name, each with metrics of its
            own (`metrics/NAME/...`), or None to not evaluate.
        extra_callbacks: run beside those that the configuration names.
        hparams: the whole resolved configuration as plain data, kept in every checkpoint.

    Raises:
        UserError: something the configuration names is unknown, missing or does not fit this machine.
    """
    plan = plan_launch(config)
    set_backend(config.backend)
    initialize_distributed(plan, config)
    wrapped = model if isinstance(model, HuggingFaceModel) else MixerComposerModel(model, tokenizer)
    if plan.cuda_graphs:
        plan = replace(plan, cuda_graphs=use_cuda_graphs(wrapped, asked=config.cuda_graphs is True))
    callbacks = [
        RankProgress(),
        StepSeed(),
        LaunchReport(plan.describe(config)),
        RunConfig(hparams or {}),
        OptimizerNumbers(),
        *CALLBACKS.build(config.callbacks),
        *extra_callbacks,
    ]
    # StableAdamW's own kernels take no shards.
    fused = plan.device == "gpu" and not (config.parallelism_config and config.optimizer.name == "stableadamw")
    kwargs = {
        "model": wrapped,
        "train_dataloader": train_spec,
        "eval_dataloader": _evaluators(eval_spec),
        "optimizers": build_optimizer(config.optimizer, wrapped, fused=fused),
        "schedulers": build_scheduler(config.scheduler),
        "algorithms": ALGORITHMS.build(config.algorithms),
        "callbacks": callbacks,
        "loggers": LOGGERS.build(config.loggers),
        **_duration_kwargs(config, evaluates=eval_spec is not None),
        **_machine_kwargs(config, plan),
        **_logging_kwargs(config),
        **_checkpoint_kwargs(config),
        # A dataset that resumes itself (StreamingDataset) needs no spinning, which would start its workers.
        "spin_dataloaders": not hasattr(getattr(train_spec.dataloader, "dataset", None), "load_state_dict"),
    }
    start = _prepare_checkpoints(config)
    checkpoint_guard.install()
    trainer = _construct({**kwargs, "load_path": start.checkpoint}, start, hparams or {})
    if note := warmup_note(config.scheduler, trainer.state):
        say(note)
    return trainer


def fit(trainer: Trainer) -> bool:
    """Train to `max_duration`; return False, having said so, when a resumed run had already got there.

    Raises UserError when `save_folder` holds checkpoints that are further than this run, and
    SystemExit(rank_verdict.LOST_RANK or FAILED) when another rank is lost.
    """
    state = trainer.state
    assert state.max_duration is not None  # build_trainer always sets it
    done = state.timestamp.get(state.max_duration.unit)
    if state.max_duration <= done:
        say(f"nothing left to train: {done} of {state.max_duration} are done")
        return False
    try:
        with ends_told():
            trainer.fit()
    except FileExistsError as error:
        raise UserError(f"save_folder: {error}") from error
    return True


def _evaluators(spec: DataSpec | Mapping[str, DataSpec] | None) -> Any:
    if isinstance(spec, Mapping):
        return [Evaluator(label=label, dataloader=one) for label, one in spec.items()]
    return spec


def _duration_kwargs(config: TrainerConfig, *, evaluates: bool) -> dict[str, Any]:
    kwargs: dict[str, Any] = {
        "max_duration": for_composer(config.max_duration),
        "train_subset_num_batches": config.train_subset_num_batches,
    }
    if evaluates:
        kwargs["eval_interval"] = for_composer(config.eval_interval)
        kwargs["eval_subset_num_batches"] = config.eval_subset_num_batches
    return kwargs


def _machine_kwargs(config: TrainerConfig, plan: LaunchPlan) -> dict[str, Any]:
    return {
        "device": plan.device,
        "precision": plan.precision,
        "device_train_microbatch_size": plan.device_train_microbatch_size,
        "accumulate_train_batch_on_tokens": True,
        "parallelism_config": build_parallelism(config.parallelism_config),
        "compile_config": {} if config.compile else None,
        "seed": config.seed,
        "deterministic_mode": config.deterministic_mode,
        "dist_timeout": config.dist_timeout,
    }


def _logging_kwargs(config: TrainerConfig) -> dict[str, Any]:
    return {
        "run_name": config.run_name,
        "progress_bar": config.progress_bar,
        "log_to_console": config.log_to_console,
        "console_log_interval": for_composer(config.console_log_interval),
        "python_log_level": config.python_log_level,
    }


def _checkpoint_kwargs(config: TrainerConfig) -> dict[str, Any]:
    return {
        "save_folder": config.save_folder,
        "save_interval": for_composer(config.save_interval),
        "save_num_checkpoints_to_keep": config.save_num_checkpoints_to_keep,
        "save_overwrite": config.save_overwrite,
        "load_weights_only": config.load_weights_only,
        "autoresume": config.autoresume,
    }


class _Start(NamedTuple):
    """The checkpoint that a run begins with, if any, and the key that asks for it."""

    key: str
    checkpoint: str | None


def _prepare_checkpoints(config: TrainerConfig) -> _Start:
    """Choose, on rank 0, what the Trainer will load; the other ranks wait."""
    chosen = [_choose_checkpoint(config) if dist.get_global_rank() == 0 else None]
    dist.broadcast_object_list(chosen)
    assert chosen[0] is not None  # rank 0 chose
    return chosen[0]


def _choose_checkpoint(config: TrainerConfig) -> _Start:
    folder = save_folder(config)
    if config.autoresume and folder is not None:
        recovery = recover(folder, sharded=saves_shards(config))
        if recovery.checkpoint or recovery.set_aside or config.load_path is None:
            say(recovery.describe(folder))
        if recovery.checkpoint is not None:
            return _Start("save_folder", str(recovery.checkpoint))
    if config.load_path is None:
        return _Start("save_folder", None)
    path = named_checkpoint(config.load_path)
    check_load_path(path, sharded=saves_shards(config))
    say(f"loading {'the weights of ' if config.load_weights_only else ''}{path}")
    return _Start("load_path", path)


class _RankTrainer(Trainer):
    """Composer's Trainer, which does not wait for the other ranks when it is closed because this one fails, nor for
    the loss before the optimizer steps."""

    def close(self) -> None:
        """Close what runs beside the training; without an exception on its way, wait for the other ranks to do so."""
        if sys.exc_info()[1] is None:
            super().close()
        else:
            self.engine.close()

    def _use_closures(self) -> bool:
        # Composer passes the forward and backward pass as a closure, reads its loss, and has the optimizer's kernels
        # launched while the GPU has nothing to do. Only an optimizer that takes two passes (SAM's) needs one.
        return all(getattr(optimizer, "_step_supports_amp_closure", False) for optimizer in self.state.optimizers)


def _construct(kwargs: dict[str, Any], start: _Start, hparams: Mapping[str, Any]) -> Trainer:
    from torch.distributed.checkpoint import CheckpointException

    where = f"{start.key}: {start.checkpoint or kwargs['save_folder']}"
    try:
        return _RankTrainer(**kwargs)
    except RefusedCheckpoint as error:
        raise UserError(f"{where}: {error}") from error
    except CheckpointException as error:  # what reading shards failed with, on each rank
        refused = [e for e, _ in error.failures.values() if isinstance(e, RefusedCheckpoint)]
        if not refused:
            raise
        raise UserError(f"{where}: {refused[0]}") from error
    except RuntimeError as error:
        # torch's own words for weights that do not fit the module they are loaded into
        if "loading state_dict" not in str(error):
            raise
        reason = _changed_model(start, hparams) or " ".join(str(error).split())[:300]
        advice = "; use another run_name or save_folder" if start.key == "save_folder" else ""
        raise UserError(f"{where}: the checkpoint does not fit this model: {reason}{advice}") from error


def _changed_model(start: _Start, hparams: Mapping[str, Any]) -> str:
    """The keys of the model in which a run differs from the one that wrote its checkpoint, where that can be told."""
    if start.checkpoint is None or not Path(start.checkpoint).exists():
        return ""
    state = read_checkpoint(start.checkpoint, start.key, mmap=True)["state"]
    kept = json.loads(state.get("callbacks", {}).get("RunConfig", {}).get("config", "{}"))
    changed = changed_keys(*({"model": one.get("model", {})} for one in (kept, hparams))) if "model" in kept else []
    return ", ".join(changed)
