"""The tasks: GLUE's (arXiv 1804.07461), with the columns and file names of its two layouts, and the demo's two."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from anymixer.errors import UserError, suggest

STSB_RANGE = (0.0, 5.0)


@dataclass(frozen=True)
class TsvLayout:
    """Where a task's original files are and what is in them.

    folders: names the folder may have. columns: of the texts; numbers for files without a header. label: its column,
    by name or number. test_columns: of the test file, where they have other names.
    """

    folders: tuple[str, ...]
    columns: tuple[str, ...] | tuple[int, ...]
    label: str | int
    test_columns: tuple[str, ...] | None = None


@dataclass(frozen=True)
class TestSet:
    """A test set without labels. split: of folder `task`; None the task's own. submission: GLUE's name of its file."""

    split: str
    submission: str
    task: str | None = None


@dataclass(frozen=True)
class Task:
    """One task.

    texts: columns of the one or two texts. labels: the classes' names, by number; empty is regression.
    metrics: GLUE's, by their names in `anymixer.glue.metrics`; the score is their mean.
    validation: name of each validation set -> its split. tests: what can be predicted for a submission.
    names_in_submission: whether predictions are written as class names rather than numbers.
    glue: whether it counts for the GLUE score.
    """

    name: str
    texts: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    validation: Mapping[str, str]
    tests: tuple[TestSet, ...]
    tsv: TsvLayout | None
    names_in_submission: bool = False
    glue: bool = True

    @property
    def num_labels(self) -> int:
        """Outputs of the head: one a class, 1 for regression."""
        return max(1, len(self.labels))

    @property
    def regression(self) -> bool:
        """Whether labels are numbers rather than classes."""
        return not self.labels

    def score(self, metrics: Mapping[str, float]) -> float:
        """Mean over the validation sets in `metrics` ("set/metric") and GLUE's metrics.

        Raises ValueError when none of them is there, or one is not a finite number.
        """
        found = [metrics[key] for name in self.validation for m in self.metrics if (key := f"{name}/{m}") in metrics]
        if not found or not all(map(math.isfinite, found)):
            raise ValueError(f"{self.name}: no score from {dict(metrics)}")
        return sum(found) / len(found)


_ENTAILMENT = ("entailment", "not_entailment")
_MNLI = ("entailment", "neutral", "contradiction")


def _one(name: str) -> dict[str, str]:
    return {name: "validation"}


_TASKS = (
    Task(
        "cola",
        ("sentence",),
        ("unacceptable", "acceptable"),
        ("matthews_correlation",),
        _one("cola"),
        (TestSet("test", "CoLA.tsv"),),
        TsvLayout(("CoLA",), (3,), 1, ("sentence",)),
    ),
    Task(
        "sst2",
        ("sentence",),
        ("negative", "positive"),
        ("accuracy",),
        _one("sst2"),
        (TestSet("test", "SST-2.tsv"),),
        TsvLayout(("SST-2",), ("sentence",), "label"),
    ),
    Task(
        "mrpc",
        ("sentence1", "sentence2"),
        ("not_equivalent", "equivalent"),
        ("accuracy", "f1"),
        _one("mrpc"),
        (TestSet("test", "MRPC.tsv"),),
        TsvLayout(("MRPC",), ("#1 String", "#2 String"), "Quality"),
    ),
    Task(
        "stsb",
        ("sentence1", "sentence2"),
        (),
        ("pearson", "spearmanr"),
        _one("stsb"),
        (TestSet("test", "STS-B.tsv"),),
        TsvLayout(("STS-B",), ("sentence1", "sentence2"), "score"),
    ),
    Task(
        "qqp",
        ("question1", "question2"),
        ("not_duplicate", "duplicate"),
        ("accuracy", "f1"),
        _one("qqp"),
        (TestSet("test", "QQP.tsv"),),
        TsvLayout(("QQP",), ("question1", "question2"), "is_duplicate"),
    ),
    Task(
        "mnli",
        ("premise", "hypothesis"),
        _MNLI,
        ("accuracy",),
        {"mnli": "validation_matched", "mnli-mm": "validation_mismatched"},
        (
            TestSet("test_matched", "MNLI-m.tsv"),
            TestSet("test_mismatched", "MNLI-mm.tsv"),
            TestSet("test", "AX.tsv", task="ax"),
        ),
        TsvLayout(("MNLI",), ("sentence1", "sentence2"), "gold_label"),
        names_in_submission=True,
    ),
    Task(
        "qnli",
        ("question", "sentence"),
        _ENTAILMENT,
        ("accuracy",),
        _one("qnli"),
        (TestSet("test", "QNLI.tsv"),),
        TsvLayout(("QNLI",), ("question", "sentence"), "label"),
        names_in_submission=True,
    ),
    Task(
        "rte",
        ("sentence1", "sentence2"),
        _ENTAILMENT,
        ("accuracy",),
        _one("rte"),
        (TestSet("test", "RTE.tsv"),),
        TsvLayout(("RTE",), ("sentence1", "sentence2"), "label"),
        names_in_submission=True,
    ),
    Task(
        "wnli",
        ("sentence1", "sentence2"),
        ("not_entailment", "entailment"),
        ("accuracy",),
        _one("wnli"),
        (TestSet("test", "WNLI.tsv"),),
        TsvLayout(("WNLI",), ("sentence1", "sentence2"), "label"),
    ),
    Task(
        "acceptability",
        ("sentence",),
        ("shuffled", "as_written"),
        ("accuracy",),
        _one("acceptability"),
        (),
        None,
        glue=False,
    ),
    Task(
        "sentence_pairs",
        ("sentence1", "sentence2"),
        ("swapped", "in_order"),
        ("accuracy",),
        _one("sentence_pairs"),
        (),
        None,
        glue=False,
    ),
)
TASKS: Mapping[str, Task] = {task.name: task for task in _TASKS}
# The diagnostic set, which an MNLI model predicts: no task of its own.
AX_TSV = TsvLayout(("diagnostic", "AX"), ("sentence1", "sentence2"), "label")


def get_task(name: str, key: str = "tasks") -> Task:
    """The task called `name`. Raises UserError, naming `key`, with the names there are."""
    if name == "ax":
        raise UserError(f"{key}.ax: has no training data; the mnli job predicts it by itself")
    if name not in TASKS:
        raise UserError(f"{key}.{name}: unknown task{suggest(name, TASKS)} (known: {', '.join(TASKS)})")
    return TASKS[name]
