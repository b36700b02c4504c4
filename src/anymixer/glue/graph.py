"""Which jobs a GLUE run consists of, and which of them start from the checkpoint of another.

Stage one starts from the run's checkpoint; RTE, MRPC and STS-B start from the MNLI job of the same seed. Where a grid
is tried, what follows its choice (further seeds, jobs that start from MNLI) is known only when the grid's results are,
so the graph is a function of them, built anew whenever they may have changed it.
"""

from collections.abc import Container, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import mean
from typing import Any

from anymixer.glue.config import MNLI, PRETRAINED, GlueSettings
from anymixer.glue.spec import JobSpec

JOB_PREFIX = "job:"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What the files say that jobs start from and train on; digests make another job of other files.

    model: the fields of ModelConfig. starting_point: local; None from scratch. starting_digests: of every starting
    point, by its name. data_digests: by task. code_digest: of the user's own mixers. left_out: task -> why it cannot
    be run.
    """

    model: Mapping[str, Any]
    starting_point: str | None = None
    starting_digests: Mapping[str, str | None] = field(default_factory=dict)
    data_digests: Mapping[str, str | None] = field(default_factory=dict)
    code_digest: str | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Node:
    """One job. point: what it takes from the grid, {} without one. needs: id of the job whose checkpoint it starts
    from, which is in `spec.starting_point` too."""

    spec: JobSpec
    point: dict[str, Any]
    needs: str | None = None

    @property
    def job_id(self) -> str:
        """The name of the job and of its folder."""
        return self.spec.job_id


@dataclass(frozen=True, kw_only=True)
class Graph:
    """The jobs known so far, in the order to start them in.

    chosen: task -> the grid's point that is reported, where it is known. waiting: what cannot be planned yet, in words.
    """

    nodes: tuple[Node, ...]
    chosen: Mapping[str, dict[str, Any]]
    waiting: tuple[str, ...] = ()


def build_graph(settings: GlueSettings, facts: Facts, scores: Mapping[str, float | None]) -> Graph:
    """The jobs of a run.

    scores: job id -> validation score of the jobs that have finished; None for those that failed for good. Jobs that
    are not in it are still to come.
    """
    planner = _Planner(settings, facts, scores)
    # MNLI first, because others wait for it; then the order of the file.
    for name in sorted(planner.names, key=lambda name: name != MNLI):
        planner.add(name)
    return Graph(nodes=tuple(planner.nodes.values()), chosen=planner.chosen, waiting=tuple(planner.waiting))


def count_jobs(settings: GlueSettings, left_out: Container[str] = ()) -> int:
    """How many jobs the run will have had at its end, whatever the grids choose."""
    total = 0
    for name in (name for name in settings.tasks if name not in left_out):
        points, seeds, tried = len(settings.grid(name)), len(settings.seeds(name)), grid_seeds(settings, name)
        total += points * tried + seeds - tried
    return total


def grid_seeds(settings: GlueSettings, name: str) -> int:
    """How many of a task's seeds try all of its grid."""
    seeds = len(settings.seeds(name))
    return seeds if settings.sweep_seeds is None else min(settings.sweep_seeds, seeds)


def choose(trials: Sequence[Node], scores: Mapping[str, float | None]) -> dict[str, Any] | None:
    """The point with the highest mean score over its seeds, the first of equals; None until all jobs have ended.

    A point with a failed job is not chosen while there is another.
    """
    if not all(node.job_id in scores for node in trials):
        return None
    points = list({tuple(node.point.items()): node.point for node in trials}.values())
    best, best_score = points[0], float("-inf")
    for point in points:
        of_point = [scores[node.job_id] for node in trials if node.point == point]
        finished = [score for score in of_point if score is not None]
        if len(finished) == len(of_point) and mean(finished) > best_score:
            best, best_score = point, mean(finished)
    return best


class _Planner:
    """Plans task after task: what one adds may depend on the jobs and choices of those before it."""

    def __init__(self, settings: GlueSettings, facts: Facts, scores: Mapping[str, float | None]) -> None:
        self.settings = settings
        self.facts = facts
        self.scores = scores
        self.names = [name for name in settings.tasks if name not in facts.left_out]
        self.nodes: dict[str, Node] = {}
        self.chosen: dict[str, dict[str, Any]] = {}
        self.waiting: list[str] = []

    def add(self, name: str) -> None:
        """Add a task's jobs: those that try its grid, and those at the point that is chosen, where it is known."""
        if self._starts_from_mnli(name) and MNLI not in self.chosen:
            self.waiting.append(f"{name}: until the grid of mnli has a choice")
            return
        seeds, grid, tried = self.settings.seeds(name), self.settings.grid(name), grid_seeds(self.settings, name)
        point: dict[str, Any] | None = grid[0]
        if len(grid) > 1:
            trials = [self._add(name, seed, point) for point in grid for seed in seeds[:tried]]
            point = choose(trials, self.scores)
        if point is not None:
            self.chosen[name] = point
            for seed in seeds:
                self._add(name, seed, point)
        elif tried < len(seeds):
            self.waiting.append(f"{name}: {len(seeds) - tried} seeds more, at the grid's choice")

    def _add(self, name: str, seed: int, point: dict[str, Any]) -> Node:
        if self._starts_from_mnli(name):
            needs = self._mnli_job(seed)
            node = Node(spec=self._spec(name, seed, point, f"{JOB_PREFIX}{needs}"), point=point, needs=needs)
        else:
            node = Node(spec=self._spec(name, seed, point, self._own_start(name)), point=point)
        return self.nodes.setdefault(node.job_id, node)

    def _starts_from_mnli(self, name: str) -> bool:
        return MNLI in self.names and self.settings.starts_from_mnli(name)

    def _own_start(self, name: str) -> str | None:
        own = self.settings.task(name).starting_point
        return self.facts.starting_point if own in (None, PRETRAINED, MNLI) else own

    def _mnli_job(self, seed: int) -> str:
        """The MNLI job of the same seed at the chosen point; of the first seed where there is none, as MosaicBERT."""
        jobs = [node for node in self.nodes.values() if node.spec.task == MNLI and node.point == self.chosen[MNLI]]
        first = self.settings.seeds(MNLI)[0]
        by_seed = {node.spec.seed: node.job_id for node in jobs}
        return by_seed.get(seed, by_seed[first])

    def _spec(self, name: str, seed: int, point: Mapping[str, Any], start: str | None) -> JobSpec:
        settings, facts = self.settings, self.facts
        task = settings.task(name)
        train = {**asdict(task.trainer_kwargs), **point}
        return JobSpec(
            task=name,
            seed=seed,
            model=dict(facts.model),
            tokenizer_name=settings.tokenizer_name,
            starting_point=start,
            starting_digest=None if start is None else facts.starting_digests.get(start),
            from_scratch=settings.from_scratch and start is None,
            data_local=settings.data_local,
            data_digest=facts.data_digests.get(name),
            code_digest=facts.code_digest,
            max_sequence_length=train["max_sequence_length"] or settings.max_seq_len,
            batch_size=train["batch_size"],
            max_duration=str(train["max_duration"]),
            eval_interval=str(train["eval_interval"]),
            lr=float(train["lr"]),
            weight_decay=float(train["weight_decay"]),
            betas=list(settings.optimizer.betas),
            eps=settings.optimizer.eps,
            optimizer=settings.optimizer.name,
            optimizer_options=settings.optimizer.options,
            scheduler={key: value for key, value in asdict(settings.scheduler).items() if value is not None},
            algorithms=settings.algorithms,
            callbacks=settings.callbacks,
            loggers=settings.loggers,
            precision=train["precision"] or settings.precision,
            pooling=task.pooling or settings.pooling,
            classifier_dropout=settings.classifier_dropout,
            packing=settings.packing,
            early_stopping=None if settings.early_stopping is None else asdict(settings.early_stopping),
            select="best" if settings.select == "best" else "last",
            trainer_kwargs=task.trainer_kwargs.passed_on(),
            save_checkpoint=name == MNLI or task.trainer_kwargs.save_num_checkpoints_to_keep != 0,
            predict=settings.predict,
        )
