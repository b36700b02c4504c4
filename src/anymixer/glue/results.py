"""What a GLUE run keeps on disk, so that the same command goes on where it was: one folder per job, and the plan.

plan.json                   the jobs of the last start
jobs/<job id>/spec.json     what the job is
jobs/<job id>/log.txt       what it printed, all attempts
jobs/<job id>/result.json   written at its end, as a whole; a job that has one is never started again
jobs/<job id>/failure.json  why it failed, instead
jobs/<job id>/lock          held by the job's process while it lives
"""

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from anymixer.errors import UserError
from anymixer.files import write_text_atomic
from anymixer.glue.spec import LOG_NAME, RESULT_NAME, JobResult, JobSpec

PLAN_NAME, SPEC_NAME, FAILURE_NAME, LOCK_NAME = "plan.json", "spec.json", "failure.json", "lock"


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A job that was given up. reason: in one line. log_end: the last lines that it printed."""

    job_id: str
    task: str
    seed: int
    attempts: int
    reason: str
    log: str
    log_end: list[str]


@dataclass(frozen=True, kw_only=True)
class PlannedJob:
    """A job of the plan, as the report needs it: its place in the grid and the job it starts from."""

    job_id: str
    task: str
    seed: int
    point: dict[str, Any]
    needs: str | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The jobs of a run as far as they are known. chosen: the grid's point that is reported, by task.

    left_out: task -> why it is not run. notes: what differs from the protocol that was asked for, in words.
    """

    name: str
    select: str
    jobs: list[PlannedJob]
    chosen: dict[str, dict[str, Any]]
    left_out: dict[str, str]
    notes: list[str]


class Store:
    """The folder of a GLUE run. Every file is replaced as a whole, so a reader never sees half of one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def job_folder(self, job_id: str) -> Path:
        """Where a job keeps everything."""
        return self.folder / "jobs" / job_id

    def log(self, job_id: str) -> Path:
        """What a job prints goes here."""
        return self.job_folder(job_id) / LOG_NAME

    def result(self, job_id: str) -> JobResult | None:
        """The result of a finished job. Raises UserError for a file that no job wrote."""
        path = self.job_folder(job_id) / RESULT_NAME
        values = _read(path)
        if values is None:
            return None
        missing = {f.name for f in fields(JobResult) if f.default is MISSING} - values.keys()
        if missing:
            raise UserError(
                f"{path}: is no whole result ({sorted(missing)[0]} is missing); move it away to run the job"
            )
        return JobResult.from_dict(values)

    def failure(self, job_id: str) -> Failure | None:
        """Why the last start gave a job up."""
        values = _read(self.job_folder(job_id) / FAILURE_NAME)
        return None if values is None else Failure(**values)

    def write_spec(self, job_id: str, spec: JobSpec) -> Path:
        """Write what a job is; return the file."""
        path = self.job_folder(job_id) / SPEC_NAME
        write_text_atomic(path, spec.to_json())
        return path

    def write_failure(self, failure: Failure) -> None:
        """Keep why a job was given up."""
        write_text_atomic(self.job_folder(failure.job_id) / FAILURE_NAME, json.dumps(asdict(failure), indent=2) + "\n")

    def clear_failure(self, job_id: str) -> None:
        """Forget an earlier start's failure."""
        (self.job_folder(job_id) / FAILURE_NAME).unlink(missing_ok=True)

    def write_plan(self, plan: Plan) -> None:
        """Keep the plan, from which a report can be made without the data and the checkpoints."""
        write_text_atomic(self.folder / PLAN_NAME, json.dumps(asdict(plan), indent=2) + "\n")

    def plan(self) -> Plan:
        """The plan of the last start. Raises UserError where there was none."""
        values = _read(self.folder / PLAN_NAME)
        if values is None:
            raise UserError(f"{self.folder}: holds no results; start the same command without --report first")
        return Plan(**{**values, "jobs": [PlannedJob(**job) for job in values["jobs"]]})


def try_lock(path: Path) -> int | None:
    """Take the lock `path` and return its file descriptor, or None while somebody else has it.

    Whoever inherits the descriptor holds the lock too: it is free when the last of them has ended, however it ended.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _read(path: Path) -> Mapping[str, Any] | None:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: is not JSON (line {error.lineno}); move it away to run the job again") from None
    if not isinstance(values, Mapping):
        raise UserError(f"{path}: holds no mapping; move it away to run the job again")
    return values
