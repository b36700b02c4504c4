"""Build Composer's Trainer from a configuration, and run it."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from anymixer_kernels.backend import set_backend
from composer import Trainer
from composer.core import Callback, DataSpec, Evaluator
from composer.models import HuggingFaceModel
from composer.utils import dist
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from anymixer.errors import UserError
from anymixer.models.checkpoint_weights import RefusedCheckpoint
from anymixer.training import checkpoint_guard
from anymixer.training.algorithms import ALGORITHMS
from anymixer.training.callbacks import CALLBACKS
from anymixer.training.checkpoints import check_load_path, recover
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
from anymixer.training.run_callbacks import LaunchReport, RunConfig, say
from anymixer.training.schedulers import build_scheduler
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
    callbacks = [
        RankProgress(),
        StepSeed(),
        LaunchReport(plan.describe(config)),
        RunConfig(hparams or {}),
        *CALLBACKS.build(config.callbacks),
        *extra_callbacks,
    ]
    wrapped = model if isinstance(model, HuggingFaceModel) else MixerComposerModel(model, tokenizer)
    if config.cuda_graphs:
        use_cuda_graphs(wrapped)
    fused = plan.device == "gpu" and not config.parallelism_config
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
    _prepare_checkpoints(config)
    checkpoint_guard.install()
    return _construct(config, kwargs)


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
        "load_path": config.load_path,
        "load_weights_only": config.load_weights_only,
        "autoresume": config.autoresume,
    }


def _prepare_checkpoints(config: TrainerConfig) -> None:
    """Choose, on rank 0, what the Trainer will load; the other ranks wait."""
    found = False
    if dist.get_global_rank() == 0:
        folder = save_folder(config)
        if config.autoresume and folder is not None:
            recovery = recover(folder, sharded=saves_shards(config))
            found = recovery.checkpoint is not None
            if found or recovery.set_aside or config.load_path is None:
                say(recovery.describe(folder))
        if config.load_path is not None and not found:
            check_load_path(config.load_path, sharded=saves_shards(config))
            say(f"loading {'the weights of ' if config.load_weights_only else ''}{config.load_path}")
    dist.barrier()


class _RankTrainer(Trainer):
    """Composer's Trainer, which does not wait for the other ranks when it is closed because this one fails."""

    def close(self) -> None:
        """Close what runs beside the training; without an exception on its way, wait for the other ranks to do so."""
        if sys.exc_info()[1] is None:
            super().close()
        else:
            self.engine.close()


def _construct(config: TrainerConfig, kwargs: dict[str, Any]) -> Trainer:
    from torch.distributed.checkpoint import CheckpointException

    key = "load_path" if config.load_path else "save_folder"
    try:
        return _RankTrainer(**kwargs)
    except RefusedCheckpoint as error:
        raise UserError(f"{key}: {getattr(config, key)}: {error}") from error
    except CheckpointException as error:  # what reading shards failed with, on each rank
        refused = [e for e, _ in error.failures.values() if isinstance(e, RefusedCheckpoint)]
        if not refused:
            raise
        raise UserError(f"{key}: {getattr(config, key)}: {refused[0]}") from error
    except RuntimeError as error:
        # torch's own words for weights that do not fit the module they are loaded into
        if "loading state_dict" not in str(error):
            raise
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{key}: {getattr(config, key)}: the checkpoint does not fit this model: {reason}") from error
