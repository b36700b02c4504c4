"""What the finished jobs of a GLUE run come to: mean, spread and best seed by task, and the average."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from anymixer.glue.graph import JOB_PREFIX
from anymixer.glue.results import Failure, Plan, Store
from anymixer.glue.spec import JobResult
from anymixer.glue.tasks import TASKS

# GLUE's WNLI has a validation set drawn against its training set; most published averages leave it out.
WNLI = "wnli"
GLUE_TASKS = tuple(name for name, task in TASKS.items() if task.glue)


@dataclass(frozen=True, kw_only=True)
class TaskSummary:
    """One task, over the seeds that finished at the reported point. Scores and metrics are fractions.

    score: mean over the seeds; std: sample standard deviation, None for a single seed. metrics: mean over the seeds by
    "set/metric". baseline: score of always answering with the commonest label. point: what was chosen from a grid of
    `points`. planned: seeds that the run has. starts: what the jobs started from, in words.
    """

    task: str
    score: float
    std: float | None
    n: int
    planned: int
    best_seed: int
    best_score: float
    metrics: dict[str, float]
    baseline: float
    baseline_metrics: dict[str, float]
    point: dict[str, Any]
    points: int
    partial: list[str]
    missing: list[str]
    starts: list[str]
    seconds: float
    results: list[JobResult]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A run. tasks: in GLUE's order. tried: finished jobs of points that were not chosen. pending: ids of jobs that
    have neither ended nor failed. average, average_with_wnli, baseline: over the GLUE tasks present (for a run without
    any, over its own), with WNLI only where it is present. absent: GLUE task -> why it is in no average.
    """

    name: str
    select: str
    tasks: list[TaskSummary]
    tried: list[JobResult]
    failures: list[Failure]
    pending: list[str]
    average: float | None
    average_with_wnli: float | None
    baseline: float | None
    averaged: list[str]
    absent: dict[str, str]
    notes: list[str]


def summarize(plan: Plan, store: Store) -> Summary:
    """Read the results of a plan's jobs and sum them up."""
    results = {job.job_id: result for job in plan.jobs if (result := store.result(job.job_id)) is not None}
    failures = [
        failure for job in plan.jobs if job.job_id not in results and (failure := store.failure(job.job_id)) is not None
    ]
    over = {failure.job_id for failure in failures} | results.keys()
    names = list(dict.fromkeys(job.task for job in plan.jobs))
    found = [_task(name, plan, results) for name in sorted(names, key=list(TASKS).index)]
    tasks = [task for task in found if task is not None]
    reported = {result.job_id for task in tasks for result in task.results}
    averaged = [task for task in tasks if task.task in GLUE_TASKS and task.task != WNLI]
    if not any(task.task in GLUE_TASKS for task in tasks):
        averaged = tasks
    with_wnli = [*averaged, *(task for task in tasks if task.task == WNLI)]
    return Summary(
        name=plan.name,
        select=plan.select,
        tasks=tasks,
        tried=[result for job_id, result in results.items() if job_id not in reported],
        failures=failures,
        pending=[job.job_id for job in plan.jobs if job.job_id not in over],
        average=_mean([task.score for task in averaged]),
        average_with_wnli=_mean([task.score for task in with_wnli]) if len(with_wnli) > len(averaged) else None,
        baseline=_mean([task.baseline for task in averaged]),
        averaged=[task.task for task in averaged],
        absent=_absent(plan, [task.task for task in tasks], failures),
        notes=list(plan.notes),
    )


def _task(name: str, plan: Plan, results: Mapping[str, JobResult]) -> TaskSummary | None:
    """The task's summary; None while no job of the reported point has finished."""
    jobs = [job for job in plan.jobs if job.task == name]
    points = {tuple(job.point.items()) for job in jobs}
    point = plan.chosen.get(name)
    if point is None:
        return None
    mine = [job for job in jobs if job.point == point]
    done = [results[job.job_id] for job in mine if job.job_id in results]
    if not done:
        return None
    best = max(done, key=lambda result: result.score)
    baseline = _means([result.majority_baseline for result in done])
    return TaskSummary(
        task=name,
        score=mean(result.score for result in done),
        std=stdev(result.score for result in done) if len(done) > 1 else None,
        n=len(done),
        planned=len(mine),
        best_seed=best.seed,
        best_score=best.score,
        metrics=_means([result.metrics for result in done]),
        baseline=TASKS[name].score(baseline),
        baseline_metrics=baseline,
        point=point,
        points=len(points),
        partial=_united([result.partial for result in done]),
        missing=_united([result.missing for result in done]),
        starts=_united([[_start(result)] for result in done]),
        seconds=sum(result.seconds for result in done),
        results=done,
    )


def _start(result: JobResult) -> str:
    start = result.spec["starting_point"]
    if start is None:
        return "random weights"
    return "the MNLI checkpoint" if start.startswith(JOB_PREFIX) else str(start)


def _absent(plan: Plan, present: Sequence[str], failures: Sequence[Failure]) -> dict[str, str]:
    """GLUE's tasks without a score, and why; none for a run of other tasks."""
    planned = {job.task for job in plan.jobs}
    reasons: dict[str, str] = {}
    if not (planned | plan.left_out.keys()) & set(GLUE_TASKS):
        return reasons
    for name in (name for name in GLUE_TASKS if name not in present):
        failed = [failure for failure in failures if failure.task == name]
        if name in plan.left_out:
            reasons[name] = plan.left_out[name]
        elif failed:
            reasons[name] = failed[0].reason
        else:
            reasons[name] = "not finished" if name in planned else "not among the tasks"
    return reasons


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each metric that all rows have."""
    return {key: mean(row[key] for row in rows) for key in rows[0] if all(key in row for row in rows)}


def _mean(values: Sequence[float]) -> float | None:
    return mean(values) if values else None


def _united(lists: Sequence[Sequence[str]]) -> list[str]:
    return list(dict.fromkeys(item for items in lists for item in items))
