"""From a job's keys to the configuration of its Trainer and the place of its weights; every mistake is found here."""

from typing import Any

from anymixer.errors import UserError, suggest
from anymixer.glue.spec import JobSpec
from anymixer.models import ModelConfig
from anymixer.options import parse_options
from anymixer.training import OptimizerConfig, SchedulerConfig, TrainerConfig
from anymixer.training.times import parse_time

# What of TrainerConfig a job may set besides its own fields; a job neither saves while it trains nor resumes.
TRAINER_KEYS = (
    "train_subset_num_batches",
    "eval_subset_num_batches",
    "device_train_microbatch_size",
    "device_eval_batch_size",
    "global_eval_batch_size",
    "compile",
    "backend",
    "cuda_graphs",
    "deterministic_mode",
    "dist_timeout",
    "progress_bar",
    "log_to_console",
    "console_log_interval",
    "python_log_level",
)


def trainer_config(spec: JobSpec, device: str) -> TrainerConfig:
    """The job's keys as those of any other training. Raises UserError, naming the key, for what is refused."""
    for key in spec.trainer_kwargs:
        if key not in TRAINER_KEYS:
            hint = suggest(key, TRAINER_KEYS) or f" (known: {', '.join(TRAINER_KEYS)})"
            raise UserError(f"trainer_kwargs.{key}: not a key of a fine-tuning job{hint}")
    early_stopping(spec)
    config = TrainerConfig(
        run_name=spec.job_id,
        seed=spec.seed,
        max_duration=spec.max_duration,
        eval_interval=spec.eval_interval,
        global_train_batch_size=spec.batch_size,
        optimizer=OptimizerConfig(
            name=spec.optimizer,
            lr=spec.lr,
            betas=list(spec.betas),
            eps=spec.eps,
            weight_decay=spec.weight_decay,
            options=spec.optimizer_options,
        ),
        scheduler=parse_options(SchedulerConfig, spec.scheduler, "scheduler"),
        algorithms=spec.algorithms,
        callbacks=spec.callbacks,
        loggers=spec.loggers,
        precision=spec.precision,
        device=device.partition(":")[0],
        **{"progress_bar": False, **spec.trainer_kwargs},
    )
    config.validate()
    if parse_time(config.eval_interval, "eval_interval")[0] == 0:
        raise UserError("eval_interval: 0 would never score the job; set e.g. 1ep")
    return config


def early_stopping(spec: JobSpec) -> dict[str, Any]:
    """Options of JobRecorder."""
    wanted = spec.early_stopping or {}
    if unknown := [key for key in wanted if key not in ("patience", "min_delta")]:
        raise UserError(f"early_stopping.{unknown[0]}: unknown key (known: patience, min_delta)")
    if wanted and int(wanted.get("patience", 0)) < 1:
        raise UserError("early_stopping.patience: must be at least 1 evaluation")
    return dict(wanted)


def starting_point(spec: JobSpec) -> str | None:
    """Name of the checkpoint to start from; None from scratch, which has to be asked for."""
    model = spec.model
    named = {
        "starting_point": spec.resolved_starting_point or spec.starting_point,
        "model.pretrained_checkpoint": model.get("pretrained_checkpoint"),
    }
    # MosaicBERT's files name the checkpoint so; a job whose weights come from elsewhere keeps the key.
    if model.get("use_pretrained") and named["starting_point"] is None:
        named["model.pretrained_model_name"] = model.get("pretrained_model_name")
    given = {key: name for key, name in named.items() if name is not None}
    if spec.from_scratch:
        if given:
            raise UserError(f"from_scratch: contradicts {next(iter(given))}; set one of them")
        return None
    if not given:
        raise UserError("starting_point: not set; name a checkpoint, or set from_scratch=true for random weights")
    if len(set(given.values())) > 1:
        raise UserError(f"{', '.join(given)}: name different checkpoints; set one of them")
    name = next(iter(given.values()))
    if name.startswith("job:"):
        raise UserError(f"starting_point: {name} has no checkpoint yet; run that job first")
    return name


def check_lengths(spec: JobSpec, model: ModelConfig, words: int) -> None:
    """Raise UserError for rows that are longer than the model's, or a tokenizer (of `words` tokens) larger than it."""
    model.validate()
    for key, limit in model.row_limits().items():
        if spec.max_sequence_length > limit:
            raise UserError(f"max_sequence_length: {spec.max_sequence_length} is longer than {key} = {limit}")
    if spec.max_sequence_length < 8:
        raise UserError(f"max_sequence_length: {spec.max_sequence_length} leaves no room for two texts")
    if words > model.vocab_size():
        raise UserError(f"tokenizer_name: has {words} tokens, more than the model's vocab_size {model.vocab_size()}")
    if spec.packing and model.name == "hf_bert":
        raise UserError("packing: needs a model that keeps the sequences of a row apart; use model.name=mixer_bert")
