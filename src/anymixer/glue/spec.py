"""What one fine-tuning job is, and what it leaves behind: plain data, so that both cross processes as JSON.

A job runs in a process of its own, `python -m anymixer.glue.job SPEC.json FOLDER`, which at the end writes
`FOLDER/result.json`; whoever starts it keeps what it prints in `FOLDER/log.txt`. It ends with code 0 and a result,
with 2 and one line for a user's mistake, and with any other code, and no result, for everything else.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

RESULT_NAME = "result.json"
LOG_NAME = "log.txt"
# The selected weights, as a Hugging Face folder with its tokenizer; a starting point for other jobs.
CHECKPOINT_NAME = "checkpoint"
# Files of test-set predictions under the names GLUE wants.
PREDICTIONS_NAME = "predictions"

_NOT_IN_ID = ("device", "save_checkpoint", "predict", "loggers", "resolved_starting_point", "data_local")


@dataclass(frozen=True, kw_only=True)
class JobSpec:
    """Everything one fine-tuning job is.

    task: a name of `anymixer.glue.tasks.TASKS`.
    model: the fields of ModelConfig.
    tokenizer_name: None takes the starting checkpoint's own; another one than that is refused.
    starting_point: a run's folder, a Composer `.pt`, a Hugging Face folder or name, or "job:<job id>".
    resolved_starting_point: where "job:<job id>" left its checkpoint, filled in before the job starts.
    starting_digest, data_digest: what the files held when the job was planned (`starting_point.checkpoint_digest`,
        `data.data_digest`); they go into the id, so that other files make another job. code_digest: the same for the
        files of the user's own mixers.
    from_scratch: the explicit wish for random weights, which nothing else gives.
    data_local: folder of parquet or TSV files; None is `nyu-mll/glue` on the Hub.
    pooling: cls or mean. classifier_dropout: before the classifier; None is the model's hidden_dropout_prob.
    packing: several sequences in a row of `max_sequence_length`, kept apart; False pads to the batch's longest.
    early_stopping: {"patience": evaluations without a better score, "min_delta": by how much at least}, or None.
    select: whose weights are the result: those of the best evaluation, or the last.
    optimizer, optimizer_options: as in OptimizerConfig. scheduler: fields of SchedulerConfig.
    trainer_kwargs: further fields of TrainerConfig.
    save_checkpoint: whether to keep the selected weights. predict: whether to predict the test sets.
    device: "cpu", "gpu", or "gpu:3" for one of several.
    """

    task: str
    seed: int
    model: dict[str, Any]
    tokenizer_name: str | None = None
    starting_point: str | None = None
    resolved_starting_point: str | None = None
    starting_digest: str | None = None
    from_scratch: bool = False
    data_local: str | None = None
    data_digest: str | None = None
    code_digest: str | None = None
    max_sequence_length: int = 256
    batch_size: int = 32
    max_duration: str = "3ep"
    eval_interval: str = "1ep"
    lr: float = 3e-5
    weight_decay: float = 3e-6
    betas: tuple[float, float] | list[float] = (0.9, 0.98)
    eps: float = 1e-6
    optimizer: str = "decoupled_adamw"
    optimizer_options: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=lambda: {"t_warmup": "0.06dur", "alpha_f": 0.0})
    algorithms: dict[str, Any] = field(default_factory=dict)
    callbacks: dict[str, Any] = field(default_factory=dict)
    loggers: dict[str, Any] = field(default_factory=dict)
    precision: str = "auto"
    pooling: str = "cls"
    classifier_dropout: float | None = None
    packing: bool = False
    early_stopping: dict[str, Any] | None = None
    select: Literal["best", "last"] = "last"
    trainer_kwargs: dict[str, Any] = field(default_factory=dict)
    save_checkpoint: bool = False
    predict: bool = True
    device: str = "cpu"

    @property
    def job_id(self) -> str:
        """The job's name, such as "mnli-seed19-ab12cd34".

        The last part is a hash of everything that changes the numbers: neither the device nor where files lie,
        unless their digests are unknown.
        """
        identity = {key: value for key, value in asdict(self).items() if key not in _NOT_IN_ID}
        if self.data_digest is None:
            identity["data_local"] = self.data_local
        if self.starting_digest is not None:
            del identity["starting_point"]
        text = json.dumps(identity, sort_keys=True, default=str)
        return f"{self.task}-seed{self.seed}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def to_json(self) -> str:
        """The job as JSON text, which `from_json` reads back."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "JobSpec":
        """Read what `to_json` wrote. Raises TypeError for a key that is not one of a job's."""
        return cls(**json.loads(text))


@dataclass(kw_only=True)
class JobResult:
    """What a finished job found.

    evaluations: one for each time the validation sets were gone through, {"step", "epoch", "score", "metrics"};
        metrics are by set and metric ("mnli/accuracy", "mnli-mm/accuracy", "rte/loss"), the score is their mean as
        GLUE takes it (`Task.score`).
    best, last: the evaluations with the highest score (the first of equals) and the final one; which of them counts
        is `spec["select"]`.
    metrics: the selected one's. majority_baseline: the same metrics of always answering with the commonest training
        label (for STS-B, the mean score, whose correlations are 0).
    partial: data sets that were there in part ("train_subset").
    missing: data sets of the task that were not there ("mnli-mm").
    starting: what the weights were taken from and what was drawn anew, in words.
    checkpoint_hash: SHA-256 of the weights' file that the job started from; None from scratch.
    train_losses: the loss of every step. seconds: from the first step to the last, evaluations included.
    predictions: file names in the job's folder, by name of the submission's file ("RTE.tsv").
    checkpoint: name in the job's folder, None when nothing was kept.
    parameters: of the model with its classifier; None in a result of an earlier version.
    """

    job_id: str
    task: str
    seed: int
    spec: dict[str, Any]
    evaluations: list[dict[str, Any]]
    best: dict[str, Any]
    last: dict[str, Any]
    metrics: dict[str, float]
    score: float
    majority_baseline: dict[str, float]
    sizes: dict[str, int]
    partial: list[str]
    missing: list[str]
    seconds: float
    peak_memory_bytes: int
    versions: dict[str, str]
    starting: str
    checkpoint_hash: str | None
    train_losses: list[float]
    predictions: dict[str, str]
    checkpoint: str | None
    parameters: int | None = None

    def to_json(self) -> str:
        """The result as JSON text, which `from_dict` reads back."""
        return json.dumps(asdict(self), indent=2, allow_nan=False) + "\n"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "JobResult":
        """Build a result from JSON's values; keys that this version does not know are left out."""
        known = {f.name for f in fields(cls)}
        return cls(**{key: value for key, value in values.items() if key in known})
