"""What is on disk is whole or not there, and what it comes to."""

import json
import multiprocessing
from dataclasses import asdict, replace

import pytest

from anymixer.errors import UserError
from anymixer.glue.graph import build_graph
from anymixer.glue.report import markdown
from anymixer.glue.results import Failure, Plan, PlannedJob, Store, try_lock
from anymixer.glue.spec import JobSpec
from anymixer.glue.summary import summarize


def failure(job_id, reason="killed by SIGKILL"):
    return Failure(job_id=job_id, task="qnli", seed=1, attempts=2, reason=reason, log="log.txt", log_end=["the end"])


@pytest.fixture
def finished(tmp_path, make_settings, facts, fake_job):
    """Write the results of a run's jobs, those of some tasks excepted; returns store and graph."""

    def write(tasks, without=(), **changes):
        settings, store, scores = make_settings(tasks, **changes), Store(tmp_path), {}
        for _ in range(2):
            graph = build_graph(settings, facts, scores)
            scores = {node.job_id: fake_job.score_of(node.spec) for node in graph.nodes}
        for node in graph.nodes:
            store.job_folder(node.job_id).mkdir(parents=True)
            if node.spec.task not in without:
                result = fake_job.result_of(node.spec)
                (store.job_folder(node.job_id) / "result.json").write_text(result.to_json())
        jobs = [
            PlannedJob(job_id=n.job_id, task=n.spec.task, seed=n.spec.seed, point=n.point, needs=n.needs)
            for n in graph.nodes
        ]
        plan = {"name": "test", "select": settings.select, "jobs": jobs, "chosen": dict(graph.chosen)}
        left_out = {"qqp": "no train split"} if "cola" in tasks else {}
        store.write_plan(Plan(**plan, left_out=left_out, notes=["a note"]))
        return store, graph

    return write


def test_a_plan_and_a_failure_read_back(tmp_path):
    store = Store(tmp_path / "run")
    with pytest.raises(UserError, match="holds no results; start the same command without --report"):
        store.plan()
    job = PlannedJob(job_id="a", task="cola", seed=3, point={"lr": 1e-5}, needs=None)
    plan = Plan(name="n", select="best", jobs=[job], chosen={"cola": {"lr": 1e-5}}, left_out={"rte": "x"}, notes=["y"])
    store.write_plan(plan)
    assert store.plan() == plan
    assert store.result("a") is None and store.failure("a") is None
    store.write_failure(failure("a"))
    assert store.failure("a") == failure("a")
    store.clear_failure("a")
    store.clear_failure("a")
    assert store.failure("a") is None


def test_half_a_file_is_named(tmp_path):
    store = Store(tmp_path)
    path = store.job_folder("a") / "result.json"
    path.parent.mkdir(parents=True)
    for text, message in (('{"job_id": ', "is not JSON"), ("[]", "holds no mapping"), ("{}", "is no whole result")):
        path.write_text(text)
        with pytest.raises(UserError, match=rf"result\.json: {message}"):
            store.result("a")


def test_a_result_of_before_parameters_were_counted_is_read(tmp_path, fake_job):
    store, result = Store(tmp_path), fake_job.result_of(JobSpec(task="cola", seed=0, model={}))
    path = store.job_folder("a") / "result.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({key: value for key, value in asdict(result).items() if key != "parameters"}))
    assert store.result("a") == replace(result, parameters=None)


def _hold(path, held, release):
    try_lock(path)
    held.set()
    release.wait()


def test_a_lock_is_free_when_its_holder_has_ended(tmp_path):
    context = multiprocessing.get_context("fork")
    held, release = context.Event(), context.Event()
    process = context.Process(target=_hold, args=(tmp_path / "x" / "lock", held, release))
    process.start()
    assert held.wait(300)
    assert try_lock(tmp_path / "x" / "lock") is None
    process.kill()
    process.join()
    assert try_lock(tmp_path / "x" / "lock") is not None


def test_mean_spread_and_best_seed(finished, fake_job):
    store, graph = finished({"cola": {"seeds": [1, 2, 6]}, "sst2": {"seeds": [4]}})
    summary = summarize(store.plan(), store)
    cola, sst2 = summary.tasks
    # The fake scores are 0.9 - 0.001 seed - 0.01 (place of the task): 0.899, 0.898, 0.894, whose mean is 0.897.
    assert cola.score == pytest.approx(0.897) and cola.std == pytest.approx((0.000014 / 2) ** 0.5)
    assert (cola.n, cola.planned, cola.best_seed, cola.best_score) == (3, 3, 1, pytest.approx(0.899))
    assert (sst2.n, sst2.std, sst2.score) == (1, None, pytest.approx(0.886))
    assert cola.metrics == {"cola/matthews_correlation": pytest.approx(0.897)} and cola.baseline == 0.5
    assert summary.average == pytest.approx((0.897 + 0.886) / 2) and summary.average_with_wnli is None
    assert summary.absent["qqp"] == "no train split" and summary.absent["rte"] == "not among the tasks"
    assert len(summary.absent) == 7 and summary.notes == ["a note"]


def test_wnli_has_an_average_of_its_own(finished):
    store, _ = finished({"cola": {"seeds": [0]}, "wnli": {"seeds": [0]}})
    summary = summarize(store.plan(), store)
    assert summary.average == pytest.approx(0.9) and summary.averaged == ["cola"]
    assert summary.average_with_wnli == pytest.approx((0.9 + 0.82) / 2)


def test_tasks_that_are_not_glues_have_their_own_average(finished):
    store, _ = finished({"acceptability": {"seeds": [0]}, "sentence_pairs": {"seeds": [0]}})
    summary = summarize(store.plan(), store)
    assert summary.averaged == ["acceptability", "sentence_pairs"] and summary.average == pytest.approx(
        (0.81 + 0.8) / 2
    )
    assert summary.absent == {} and "published" not in markdown(summary)


def test_what_failed_or_is_pending_is_in_no_figure(finished):
    store, graph = finished({"cola": {}, "qnli": {"seeds": [1]}, "rte": {"seeds": [1]}}, without=("qnli", "rte"))
    ids = {node.spec.task: node.job_id for node in graph.nodes}
    store.write_failure(failure(ids["qnli"]))
    summary = summarize(store.plan(), store)
    assert [task.task for task in summary.tasks] == ["cola"]
    assert [f.job_id for f in summary.failures] == [ids["qnli"]] and summary.pending == [ids["rte"]]
    assert summary.absent["qnli"] == "killed by SIGKILL" and summary.absent["rte"] == "not finished"


def test_of_a_grid_the_chosen_point_alone_counts(finished):
    tasks = {"cola": {"seeds": [0, 1], "sweep": {"lr": [1e-5, 3e-5, 5e-5]}}}
    store, _ = finished(tasks, sweep_seeds=1)
    summary = summarize(store.plan(), store)
    (cola,) = summary.tasks
    assert (cola.point, cola.points, cola.n) == ({"lr": 3e-5}, 3, 2) and len(summary.tried) == 2
    assert cola.score == pytest.approx(0.8995)


def test_the_evaluation_that_counts_is_the_selected_one(finished):
    store, _ = finished({"cola": {"seeds": [0]}}, select="best")
    summary = summarize(store.plan(), store)
    assert summary.select == "best" and json.loads((store.folder / "plan.json").read_text())["select"] == "best"
