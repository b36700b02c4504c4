"""The keys of a GLUE run: what MosaicBERT's and Hydra's finetuning files hold, typed and checked before any work.

Plain data; neither Composer nor torch is imported here.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import product
from random import Random
from typing import Any

from anymixer.errors import UserError, suggest
from anymixer.glue.tasks import get_task
from anymixer.models import ModelConfig
from anymixer.training.times import parse_time
from anymixer.training.trainer_config import DEVICES, MAX_SEED, PRECISIONS, OptimizerConfig, SchedulerConfig

POOLINGS = ("cls", "mean")
SELECTIONS = ("best", "last")
PRETRAINED, MNLI = "pretrained", "mnli"
# GLUE's small tasks, which the published protocols start from a model finetuned on MNLI.
STAGE_TWO = ("rte", "mrpc", "stsb")
# What a grid may vary.
SWEPT = ("lr", "weight_decay", "max_duration", "batch_size")


@dataclass(kw_only=True)
class GlueOptimizerConfig:
    """The optimizer that every job shares; `lr` and `weight_decay` are each task's own."""

    name: str = "decoupled_adamw"
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    eps: float = 1e-6
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class EarlyStoppingConfig:
    """Stop a job when `patience` evaluations in a row have not raised its best score by `min_delta`."""

    patience: int = 3
    min_delta: float = 0.0

    def validate(self, key: str) -> None:
        """Raise UserError, naming the key, for a value that would stop everything or nothing."""
        if self.patience < 1:
            raise UserError(f"{key}.patience: {self.patience} must be at least 1 evaluation")
        if self.min_delta < 0:
            raise UserError(f"{key}.min_delta: {self.min_delta} must not be negative")


@dataclass(kw_only=True)
class TaskTrainerConfig:
    """How to train on one task: `tasks.<task>.trainer_kwargs`.

    lr, weight_decay, batch_size, max_duration, eval_interval: must be given; the recipes of `yamls/_base` do.
    max_sequence_length: tokens, of both sentences; None takes the run's `max_seq_len`.
    save_num_checkpoints_to_keep: 0 keeps none that no other job starts from; any other number keeps the one whose
        score counts. precision: None takes the run's. The other keys are those of a pretraining run.
    """

    lr: float | None = None
    weight_decay: float | None = None
    batch_size: int | None = None
    max_duration: str | None = None
    eval_interval: str | None = None
    max_sequence_length: int | None = None
    save_num_checkpoints_to_keep: int = 0
    precision: str | None = None
    device_train_microbatch_size: Any = "auto"
    device_eval_batch_size: int | None = None
    train_subset_num_batches: int = -1
    eval_subset_num_batches: int = -1
    compile: bool = False
    backend: str = "auto"
    cuda_graphs: bool | str = False
    deterministic_mode: bool = False

    def validate(self, key: str) -> None:
        """Raise UserError, naming the key below `key`, for what is missing or impossible."""
        for name in ("lr", "weight_decay", "batch_size", "max_duration", "eval_interval"):
            if getattr(self, name) is None:
                raise UserError(
                    f"{key}.{name}: must be set; inherit a published recipe, such as yamls/_base/glue_mosaic.yaml"
                )
        OptimizerConfig(lr=self.lr or 0.0, weight_decay=self.weight_decay or 0.0).validate(key)
        parse_time(str(self.max_duration), f"{key}.max_duration", units=("ep", "ba", "sp"))
        parse_time(str(self.eval_interval), f"{key}.eval_interval", units=("ep", "ba", "dur"))
        for name in ("batch_size", "max_sequence_length", "device_eval_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{key}.{name}: {value} must be at least 1")
        if self.save_num_checkpoints_to_keep < -1:
            raise UserError(f"{key}.save_num_checkpoints_to_keep: {self.save_num_checkpoints_to_keep} is below -1")
        _check_choice(self.precision, PRECISIONS, f"{key}.precision")

    def passed_on(self) -> dict[str, Any]:
        """The keys that a job's Trainer takes as they are, less those left at their defaults."""
        names = ("device_train_microbatch_size", "device_eval_batch_size", "train_subset_num_batches")
        names += ("eval_subset_num_batches", "compile", "backend", "cuda_graphs", "deterministic_mode")
        default = TaskTrainerConfig()
        return {n: getattr(self, n) for n in names if getattr(self, n) != getattr(default, n)}


@dataclass(kw_only=True)
class TaskConfig:
    """One task of the run.

    seeds: one job each; None is `num_task_run` of them from `default_seed` on.
    starting_point: "pretrained" (the run's checkpoint), "mnli" (the MNLI job of the same seed, else of the first),
        or a checkpoint of its own; None is "mnli" for RTE, MRPC and STS-B where MNLI is run too.
    pooling: None takes the run's.
    sweep: a grid over SWEPT, each a list; every point is tried and the best on the validation set is reported.
    """

    seeds: list[int] | None = None
    starting_point: str | None = None
    pooling: str | None = None
    sweep: dict[str, list[Any]] = field(default_factory=dict)
    trainer_kwargs: TaskTrainerConfig = field(default_factory=TaskTrainerConfig)

    def validate(self, key: str) -> None:
        """Raise UserError, naming the key below `key`, for a value that cannot be used."""
        self.trainer_kwargs.validate(f"{key}.trainer_kwargs")
        _check_choice(self.pooling, POOLINGS, f"{key}.pooling")
        validate_sweep(self.sweep, f"{key}.sweep", self.trainer_kwargs)
        if self.seeds is not None:
            if not self.seeds:
                raise UserError(f"{key}.seeds: is empty; give at least one, such as [19]")
            if len(set(self.seeds)) < len(self.seeds):
                raise UserError(f"{key}.seeds: {self.seeds} has one twice, which would be the same job")
            for seed in self.seeds:
                _check_seed(seed, f"{key}.seeds")


@dataclass(kw_only=True)
class GlueSettings:
    """A GLUE run: one job for every task and seed (and point of a grid), and where its results lie.

    base_run_name: of the run; None is the file's name. default_seed: of tasks without `seeds`.
    num_task_run: how many seeds a task without `seeds` gets: `default_seed` first, the others drawn from it.
    from_mnli: whether RTE, MRPC and STS-B start from MNLI's checkpoint; None: where MNLI is among the tasks.
    parallel: one job per device at a time; False is one job at a time. jobs_at_once: None is the number of GPUs, or
        of CPU cores. job_time_limit: seconds after which a job that hangs is killed, and tried once more.
    device: "gpu", "cpu", or None for GPUs where there are any.
    data_local: folder of GLUE's parquet or TSV files, one folder per task; None is `nyu-mll/glue` on the Hub.
    model: None takes the one that the starting checkpoint was trained as.
    starting_checkpoint_load_path: folder of a pretraining run, Composer `.pt`, or Hugging Face folder or name.
    local_pretrain_checkpoint_folder: where a starting checkpoint with a URI (s3://...) is downloaded to.
    from_scratch: start from random weights on purpose.
    save_finetune_checkpoint_folder: of all results; None is `save_finetune_checkpoint_prefix`/`base_run_name`.
    pooling: "cls" or "mean". packing: several sequences in a row, kept apart.
    select: whose score counts: the "best" evaluation's or the "last" one's.
    sweep: the grid of every task that has none of its own. sweep_seeds: how many of a task's seeds try the whole
        grid; the others run at the chosen point alone. None: all of them.
    predict: write the test sets' predictions in GLUE's submission format.
    """

    base_run_name: str | None = None
    default_seed: int = 19
    num_task_run: int | None = None
    from_mnli: bool | None = None
    parallel: bool = True
    jobs_at_once: int | None = None
    job_time_limit: float | None = None
    device: str | None = None

    data_local: str | None = None
    max_seq_len: int = 256
    tokenizer_name: str | None = None
    model: ModelConfig | None = None
    starting_checkpoint_load_path: str | None = None
    local_pretrain_checkpoint_folder: str | None = None
    from_scratch: bool = False
    save_finetune_checkpoint_prefix: str = "runs/glue"
    save_finetune_checkpoint_folder: str | None = None

    precision: str = "auto"
    optimizer: GlueOptimizerConfig = field(default_factory=GlueOptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=lambda: SchedulerConfig(alpha_f=0.0))
    algorithms: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, Any] = field(default_factory=dict)
    loggers: dict[str, Any] = field(default_factory=dict)

    pooling: str = "cls"
    classifier_dropout: float | None = None
    packing: bool = False
    select: str = "last"
    early_stopping: EarlyStoppingConfig | None = None
    sweep: dict[str, list[Any]] = field(default_factory=dict)
    sweep_seeds: int | None = None
    predict: bool = True
    tasks: dict[str, TaskConfig | None] = field(default_factory=dict)

    def task(self, name: str) -> TaskConfig:
        """The task's settings; a task that is only named has the defaults."""
        return self.tasks[name] or TaskConfig()

    def validate(self) -> None:
        """Raise UserError, naming the key, for what no machine could run; looks at no device, data or checkpoint."""
        _check_seed(self.default_seed, "default_seed")
        for name in ("num_task_run", "jobs_at_once", "max_seq_len", "sweep_seeds"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name}: {getattr(self, name)} must be at least 1")
        if self.job_time_limit is not None and not self.job_time_limit > 0:
            raise UserError(f"job_time_limit: {self.job_time_limit} seconds must be above 0")
        _check_choice(self.precision, PRECISIONS, "precision")
        _check_choice(self.device, DEVICES[:2], "device")
        _check_choice(self.pooling, POOLINGS, "pooling")
        _check_choice(self.select, SELECTIONS, "select")
        if self.early_stopping is not None:
            self.early_stopping.validate("early_stopping")
        self._validate_start()
        self._validate_tasks()

    def _validate_start(self) -> None:
        if self.model is not None:
            self.model.validate()
            if self.model.pretrained_checkpoint is not None:
                raise UserError("model.pretrained_checkpoint: set starting_checkpoint_load_path instead")
        start = self.starting_point()
        if self.from_scratch and start is not None:
            raise UserError(f"from_scratch: true, but a starting point is given too ({start}); remove one of them")
        if self.from_scratch and self.model is None:
            raise UserError("model: must be set, because from_scratch leaves no checkpoint to take it from")
        needy = [name for name in self.tasks if self.task(name).starting_point in (None, PRETRAINED, MNLI)]
        if start is None and not self.from_scratch and needy:
            raise UserError(
                "starting_checkpoint_load_path: must be set: the folder of a pretraining run, a Composer .pt, or a "
                "Hugging Face folder or name (from_scratch: true starts from random weights)"
            )
        if start is not None and "://" in start and not self.local_pretrain_checkpoint_folder:
            raise UserError(f"local_pretrain_checkpoint_folder: must be set; {start} is downloaded to it")

    def _validate_tasks(self) -> None:
        if not self.tasks:
            raise UserError("tasks: none given; name at least one, such as tasks: {cola: {}}")
        for name in self.tasks:
            get_task(name)
            task, key = self.task(name), f"tasks.{name}"
            task.validate(key)
            validate_sweep(self.sweep, "sweep", task.trainer_kwargs)
            self.scheduler.validate(str(task.trainer_kwargs.max_duration))
            if task.starting_point == MNLI and name == MNLI:
                raise UserError(f"{key}.starting_point: MNLI cannot start from itself")
            if task.starting_point == MNLI and MNLI not in self.tasks:
                raise UserError(f"{key}.starting_point: needs mnli among the tasks, or a checkpoint of its own")
        if self.from_mnli and MNLI not in self.tasks:
            raise UserError("from_mnli: needs mnli among the tasks; jobs that are finished are not run again")

    def starting_point(self) -> str | None:
        """The run's starting checkpoint. MosaicBERT's files give hf_bert's as the model's own weights."""
        if self.starting_checkpoint_load_path is None and self.model is not None and self.model.use_pretrained:
            return self.model.pretrained_model_name
        return self.starting_checkpoint_load_path

    def starts_from_mnli(self, name: str) -> bool:
        """Whether the jobs of a task begin with the weights of an MNLI job."""
        own = self.task(name).starting_point
        if own is not None:
            return own == MNLI
        return name in STAGE_TWO and MNLI in self.tasks and self.from_mnli is not False and not self.from_scratch

    def seeds(self, name: str) -> list[int]:
        """The seeds of a task: its own, or `num_task_run` of them, the same at every start."""
        own = self.task(name).seeds
        if own is not None:
            return own
        # Drawn one by one, so that raising num_task_run keeps those there were.
        random, seeds = Random(self.default_seed), [self.default_seed]
        while len(seeds) < (self.num_task_run or 1):
            seed = random.randrange(100_000)
            seeds += [seed] if seed not in seeds else []
        return seeds

    def grid(self, name: str) -> list[dict[str, Any]]:
        """The points that a task tries, each {key of trainer_kwargs: value}; [{}] without a sweep."""
        sweep = self.task(name).sweep or self.sweep
        return [dict(zip(sweep, values)) for values in product(*sweep.values())]


def validate_sweep(sweep: Mapping[str, list[Any]], key: str, task: TaskTrainerConfig) -> None:
    """Raise UserError for a key that cannot be swept, an empty list, or a point that a task could not train at."""
    for name, values in sweep.items():
        if name not in SWEPT:
            raise UserError(f"{key}.{name}: cannot be swept{suggest(name, SWEPT)} (known: {', '.join(SWEPT)})")
        if not values or len(set(values)) < len(values):
            raise UserError(f"{key}.{name}: {values} must be values that differ, at least one")
        for value in values:
            typed = _swept_value(name, value, key)
            TaskTrainerConfig(**{**asdict(task), name: typed}).validate(key)


def _swept_value(name: str, value: Any, key: str) -> Any:
    kind = {"lr": (int, float), "weight_decay": (int, float), "batch_size": int, "max_duration": str}[name]
    if isinstance(value, bool) or not isinstance(value, kind):
        raise UserError(f"{key}.{name}: {value!r} is not of the type that trainer_kwargs.{name} has")
    return value


def _check_seed(seed: int, key: str) -> None:
    if not 0 <= seed <= MAX_SEED:
        raise UserError(f"{key}: {seed} must lie between 0 and {MAX_SEED}")


def _check_choice(value: str | None, known: tuple[str, ...], key: str) -> None:
    if value is not None and value not in known:
        raise UserError(f"{key}: '{value}' is none of {', '.join(known)}{suggest(value, known)}")
