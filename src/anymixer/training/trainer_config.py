"""The keys of a training run: dataclasses with MosaicBERT's flat names, checked before any work.

Everything here is plain data; composer and torch are not imported, so that reading and checking a
configuration is quick and touches no device.
"""

from dataclasses import dataclass, field
from typing import Any

from anymixer.errors import UserError, suggest
from anymixer.training.times import length, parse_time, scheduler_unit

PRECISIONS = ("auto", "fp32", "amp_bf16", "amp_fp16", "amp_fp8")
DEVICES = ("cpu", "gpu", "mps")
# As in anymixer_kernels.BACKENDS, which only torch's import would give.
BACKENDS = ("auto", "triton", "torch", "reference", "mamba_ssm")
DECAYS = ("linear", "sqrt")
# The schedules that Composer lacks, and how long the decay of one lasts.
INVERSE_SQRT = "inverse_sqrt_with_warmup"
WSD, WSD_DECAY = "warmup_stable_decay", "0.1dur"
LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
# Signs of life come once a second; a machine that is busy may delay a few.
MIN_RANK_TIMEOUT = 5.0
# Composer adds the rank to the seed and allows sums below 2**32.
MAX_SEED = 2**32 - 2**16


@dataclass(kw_only=True)
class OptimizerConfig:
    """The optimizer: `name` is one of `optimizers.OPTIMIZERS`; `options` are its further keyword arguments.

    For `decoupled_adamw` the weight decay is not multiplied by the learning rate (MosaicBERT uses 1e-5).
    """

    name: str = "decoupled_adamw"
    lr: float = 5e-4
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    eps: float = 1e-6
    weight_decay: float = 1e-5
    options: dict[str, Any] = field(default_factory=dict)

    def validate(self, key: str = "optimizer") -> None:
        """Raise UserError, naming the key, when a value is out of its range."""
        if not self.lr > 0:
            raise UserError(f"{key}.lr: {self.lr} is not above 0, so nothing would be trained; set e.g. 5e-4")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(f"{key}.betas: {self.betas} must be two numbers in [0, 1), e.g. [0.9, 0.98]")
        if not self.eps > 0:
            raise UserError(f"{key}.eps: {self.eps} must be above 0, e.g. 1e-6")
        if self.weight_decay < 0:
            raise UserError(f"{key}.weight_decay: {self.weight_decay} must not be negative")


@dataclass(kw_only=True)
class SchedulerConfig:
    """The learning-rate schedule: `name` is one of `schedulers.SCHEDULERS`.

    Times are Composer's strings: "0.06dur" (a share of max_duration), "500ba", "1ep", "1000sp". A key
    left at None takes the schedule's own default; a key that the schedule does not have is refused.

    t_warmup: linear warm-up from 0. t_max: where the schedule ends (default "1dur").
    t_decay, decay: warmup_stable_decay alone: how long the last phase lasts, and "linear" or "sqrt".
    alpha_i, alpha_f: multipliers of the learning rate at the start and at the end of the decay.
    alpha: constant_with_warmup alone: the multiplier after the warm-up.
    """

    name: str = "linear_decay_with_warmup"
    t_warmup: str = "0.06dur"
    t_max: str | None = None
    t_decay: str | None = None
    decay: str | None = None
    alpha: float | None = None
    alpha_i: float | None = None
    alpha_f: float | None = None
    scale_warmup: bool | None = None

    def validate(self, max_duration: str, key: str = "scheduler") -> None:
        """Raise UserError, naming the key, for a time that cannot be used or a multiplier below 0.

        Composer compares the schedule's times with each other and with `max_duration`, so all must
        come down to one unit. What only the number of steps in an epoch tells is checked when training begins.
        """
        if self.name == INVERSE_SQRT and parse_time(self.t_warmup, f"{key}.t_warmup")[0] == 0:
            raise UserError(f"{key}.t_warmup: {INVERSE_SQRT} falls from where the warm-up ends; set e.g. 4000ba")
        end = scheduler_unit(self.t_max or "1dur", max_duration, f"{key}.t_max")
        for name in ("t_warmup", "t_decay"):
            value = getattr(self, name)
            if value is not None and (unit := scheduler_unit(value, max_duration, f"{key}.{name}")) != end:
                raise UserError(
                    f"{key}.{name}: {value} is counted in {unit}, but the schedule ends in {end} "
                    f"(max_duration: {max_duration}); give it in {end} or as a share such as 0.06dur"
                )
        self._validate_lengths(max_duration, key)
        if self.decay is not None and self.decay not in DECAYS:
            raise UserError(f"{key}.decay: '{self.decay}' is none of {', '.join(DECAYS)}")
        for name in ("alpha", "alpha_i", "alpha_f"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise UserError(f"{key}.{name}: {value} must not be negative")

    def _validate_lengths(self, max_duration: str, key: str) -> None:
        """The schedule must last as long as its parts and, but for WSD's, which stays at its end, the training."""
        t_max, t_decay = self.t_max or "1dur", self.t_decay or WSD_DECAY
        end, whole = (length(text, max_duration, key) for text in (t_max, max_duration))
        if self.name != WSD and end.unit == whole.unit and end.value < whole.value:
            raise UserError(f"{key}.t_max: {t_max} ends before the training does ({max_duration}); leave it out")
        warmup, decay = (length(text, max_duration, key) for text in (self.t_warmup, t_decay))
        one_unit = {warmup.unit, decay.unit, end.unit} == {end.unit}
        if self.name == WSD and one_unit and round(warmup.value + decay.value - end.value, 9) > 0:
            raise UserError(
                f"{key}.t_decay: t_warmup ({self.t_warmup}) and t_decay ({t_decay}) together are longer than the "
                f"schedule ({t_max})"
            )


@dataclass(kw_only=True)
class TrainerConfig:
    """How to train, whatever the model and the data: the part of a run that Composer's Trainer is built from.

    Batch sizes are in sequences. `global_*` are sums over all ranks, `device_*` are of one rank.
    Durations and intervals are Composer's time strings ("1000ba", "1ep", "286720000sp").

    device_train_microbatch_size: an int, or "auto": Composer's search for what fits on a GPU, the rank's
        whole batch on a CPU.
    precision: "auto" is amp_bf16 on a GPU and fp32 elsewhere.
    backend: which form of the mixing ops runs: one of anymixer_kernels.BACKENDS; "auto" is Triton's on a GPU.
    cuda_graphs: record the layers' training passes and replay them, on a GPU, where the batch keeps its shape; "auto"
        does where one process trains, without `compile` and FSDP2.
    parallelism_config: None is DDP (with more than one rank); {"fsdp": {...}} is FSDP2, with the keys of
        composer.utils.parallelism.FSDP2Config.
    algorithms, callbacks, loggers: name -> keyword arguments, from the tables of this package.
    autoresume: continue from the newest whole checkpoint of `save_folder`, if there is one.
    load_path: a checkpoint to start from, or a run's folder, whose newest it is: everything (weights, optimizer, data
        position), or with `load_weights_only` the weights alone. A checkpoint found by `autoresume` goes first.
    dist_timeout: seconds that one rank waits for another.
    rank_timeout: seconds without a sign of life after which a rank counts as lost, which ends the launch; signs of life
        need no step to end, so however long steps take. 0: none are given.
    """

    run_name: str | None = None
    seed: int = 17
    max_duration: str = "286720000sp"
    global_train_batch_size: int = 4096
    device_train_microbatch_size: Any = "auto"
    train_subset_num_batches: int = -1

    eval_interval: str = "2000ba"
    device_eval_batch_size: int | None = None
    global_eval_batch_size: int | None = None
    eval_subset_num_batches: int = -1

    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    algorithms: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, Any] = field(default_factory=dict)
    loggers: dict[str, Any] = field(default_factory=dict)

    precision: str = "auto"
    device: str | None = None
    compile: bool = False
    backend: str = "auto"
    cuda_graphs: bool | str = False
    deterministic_mode: bool = False
    parallelism_config: dict[str, Any] | None = None
    dist_timeout: float = 300.0
    rank_timeout: float = 45.0

    progress_bar: bool = True
    log_to_console: bool = False
    console_log_interval: str = "1ba"
    python_log_level: str | None = None

    save_folder: str | None = None
    save_interval: str = "1000ba"
    save_num_checkpoints_to_keep: int = -1
    save_overwrite: bool = False
    load_path: str | None = None
    load_weights_only: bool = False
    autoresume: bool = False

    def validate(self) -> None:
        """Raise UserError, naming the key, for a value that no machine could run; reads no device or file."""
        self.optimizer.validate()
        duration, _ = parse_time(self.max_duration, "max_duration", units=("ep", "ba", "sp", "tok"))
        if duration == 0:
            raise UserError(f"max_duration: {self.max_duration} would train nothing; set e.g. 1000ba")
        self.scheduler.validate(self.max_duration)
        self._validate_numbers()
        self._validate_choices()
        self._validate_intervals()
        self._validate_checkpoints()
        self._validate_parallelism()

    def _validate_numbers(self) -> None:
        for name in ("global_train_batch_size", "device_eval_batch_size", "global_eval_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name}: {value} must be at least 1")
        for name in ("train_subset_num_batches", "eval_subset_num_batches"):
            if getattr(self, name) < -1 or getattr(self, name) == 0:
                raise UserError(f"{name}: {getattr(self, name)} must be -1 (all) or at least 1")
        size = self.device_train_microbatch_size
        if size != "auto" and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise UserError(f"device_train_microbatch_size: {size!r} must be auto or at least 1")
        if not 0 <= self.seed <= MAX_SEED:
            raise UserError(f"seed: {self.seed} must lie between 0 and {MAX_SEED}")
        if not self.dist_timeout > 0:
            raise UserError(f"dist_timeout: {self.dist_timeout} seconds must be above 0")
        if self.rank_timeout != 0 and not self.rank_timeout >= MIN_RANK_TIMEOUT:
            raise UserError(
                f"rank_timeout: {self.rank_timeout} must be 0 (do not watch) or at least {MIN_RANK_TIMEOUT:g} seconds"
            )

    def _validate_choices(self) -> None:
        choices = {
            "precision": PRECISIONS,
            "device": DEVICES,
            "backend": BACKENDS,
            "python_log_level": LOG_LEVELS,
        }
        for name, known in choices.items():
            value = getattr(self, name)
            if value is not None and value.lower() not in known:
                raise UserError(f"{name}: '{value}' is none of {', '.join(known)}{suggest(value, known)}")

    def _validate_intervals(self) -> None:
        parse_time(self.eval_interval, "eval_interval")
        value, _ = parse_time(self.console_log_interval, "console_log_interval", units=("ep", "ba"))
        if value == 0:
            raise UserError("console_log_interval: 0 would never log; log_to_console: false logs nothing")
        value, _ = parse_time(self.save_interval, "save_interval")
        if value == 0:
            raise UserError("save_interval: 0 would never save; leave save_folder out to save nothing")

    def _validate_checkpoints(self) -> None:
        if self.autoresume and not self.save_folder:
            raise UserError("autoresume: needs save_folder, whose newest checkpoint it continues from")
        if self.save_num_checkpoints_to_keep < -1 or self.save_num_checkpoints_to_keep == 0:
            number = self.save_num_checkpoints_to_keep
            raise UserError(f"save_num_checkpoints_to_keep: {number} must be -1 (all) or at least 1")
        if self.load_weights_only and not self.load_path:
            raise UserError("load_weights_only: has no effect without load_path; name the checkpoint")

    def _validate_parallelism(self) -> None:
        if self.cuda_graphs not in (True, False, "auto"):
            raise UserError(f"cuda_graphs: '{self.cuda_graphs}' is none of true, false, auto")
        if self.cuda_graphs is True and self.compile:
            raise UserError("cuda_graphs: cannot be joined with compile: true; choose one")
        if not self.parallelism_config:
            return
        if self.cuda_graphs is True:
            raise UserError("cuda_graphs: cannot record parameters that FSDP2 shards (parallelism_config.fsdp)")
        unknown = [name for name in self.parallelism_config if name != "fsdp"]
        if unknown:
            raise UserError(f"parallelism_config.{unknown[0]}: unknown key; the only one is 'fsdp' (FSDP2)")
        if self.device_train_microbatch_size == "auto":
            raise UserError(
                "device_train_microbatch_size: Composer cannot search for it under FSDP2 "
                "(parallelism_config.fsdp); give a number, e.g. 32"
            )
