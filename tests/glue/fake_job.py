"""A job that trains nothing, for tests of what runs jobs: `python fake_job.py SPEC.json FOLDER`.

Behaves as the JSON in $FAKE_JOB says: {"seconds": how long, "fail": [tasks], "mistake": [tasks], "hang": [tasks],
"die": {"TASK-seedN": when}}, and adds a line to runs.txt beside its folder's parent. What is to die does so once, as by
`kill -9`, at one of the moments in DEATHS. The score is a function of task, seed and learning rate.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from anymixer.files import write_text_atomic
from anymixer.glue.spec import JobResult, JobSpec
from anymixer.glue.tasks import TASKS

DEATHS = ("at once", "after work", "before its result", "after its result")


def score_of(spec):
    """Between 0.5 and 1; highest at a learning rate of 3e-5."""
    return 0.9 - 0.001 * (spec.seed % 50) - abs(spec.lr - 3e-5) * 1e3 - 0.01 * list(TASKS).index(spec.task)


def result_of(spec):
    """The result of a job with two evaluations, the first the better by 0.01."""
    task, score = TASKS[spec.task], score_of(spec)

    def evaluation(step, value):
        metrics = {f"{name}/{metric}": value for name in task.validation for metric in task.metrics}
        return {"step": step, "epoch": step / 10, "score": value, "metrics": metrics}

    evaluations = [evaluation(10, score + 0.01), evaluation(20, score)]
    selected = evaluations[0 if spec.select == "best" else 1]
    return JobResult(
        job_id=spec.job_id,
        task=spec.task,
        seed=spec.seed,
        spec=json.loads(spec.to_json()),
        evaluations=evaluations,
        best=evaluations[0],
        last=evaluations[1],
        metrics=selected["metrics"],
        score=selected["score"],
        majority_baseline={key: 0.5 for key in selected["metrics"]},
        sizes={"train": 8, spec.task: 4},
        partial=[],
        missing=[],
        seconds=0.1,
        peak_memory_bytes=1000,
        versions={"torch": "2"},
        starting=str(spec.resolved_starting_point or spec.starting_point),
        checkpoint_hash=None,
        train_losses=[1.0, 0.5],
        predictions={test.submission: f"predictions/{test.submission}" for test in task.tests},
        checkpoint="checkpoint" if spec.save_checkpoint else None,
        parameters=112_345_678,
    )


def told():
    """How to behave."""
    return json.loads(os.environ.get("FAKE_JOB", "{}"))


def may_die(moment, spec, folder):
    """Die if this is the moment to, and it has not been done."""
    if told().get("die", {}).get(f"{spec.task}-seed{spec.seed}") == moment and not (folder / "died").exists():
        (folder / "died").touch()
        os.kill(os.getpid(), signal.SIGKILL)


def main():
    spec, folder = JobSpec.from_json(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    behaviour = told()
    with open(folder.parents[1] / "runs.txt", "a") as file:
        file.write(f"{spec.job_id} {os.environ.get('CUDA_VISIBLE_DEVICES')} {os.environ['OMP_NUM_THREADS']}\n")
    print("the job says hello", flush=True)
    may_die("at once", spec, folder)
    if spec.resolved_starting_point is not None:
        assert Path(spec.resolved_starting_point).is_dir()
    if spec.task in behaviour.get("mistake", []):
        print("error: lr: is a mistake")
        sys.exit(2)
    time.sleep(600 if spec.task in behaviour.get("hang", []) else behaviour.get("seconds", 0))
    may_die("after work", spec, folder)
    if spec.task in behaviour.get("fail", []):
        raise RuntimeError("out of memory")
    for test in TASKS[spec.task].tests:
        write_text_atomic(folder / "predictions" / test.submission, "index\tprediction\n0\t1\n")
    if spec.save_checkpoint:
        (folder / "checkpoint").mkdir(exist_ok=True)
    may_die("before its result", spec, folder)
    write_text_atomic(folder / "result.json", result_of(spec).to_json())
    may_die("after its result", spec, folder)


if __name__ == "__main__":
    main()
