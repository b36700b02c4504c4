"""`metrics.jsonl`: every step once, whatever is killed and resumed, and the figures summed up from it."""

import json

import pytest

from anymixer.training.run_metrics import evaluation, last_step, read_metrics, summarize


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_resumed_run_holds_every_step_and_evaluation_once(tmp_path, write_run, call_main):
    file = write_run(tmp_path, "run", eval_interval="2ba", eval_first="true")
    assert call_main(file, "max_duration=3ba") == 0
    metrics = tmp_path / "run" / "metrics.jsonl"
    (tmp_path / "run" / "ep0-ba3-rank0.pt").unlink()  # as if killed after step 3 and before its checkpoint
    with open(metrics, "a") as cut:
        cut.write('{"step": 4, "tok')
    assert call_main(file) == 0
    whole = metrics.read_bytes()
    assert [line["step"] for line in lines_of(metrics) if "seconds" in line] == [1, 2, 3, 4]
    assert [line["step"] for line in lines_of(metrics) if "eval_loss" in line] == [0, 2, 4]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    steps = [line for line in lines_of(metrics) if "seconds" in line]
    assert summary["tokens"] == steps[-1]["tokens"] > 0
    assert summary["train_loss"] == steps[-1]["loss"]
    assert summary["before"]["loss"] == lines_of(metrics)[0]["eval_loss"]
    assert summary["after"]["loss"] == pytest.approx(lines_of(metrics)[-1]["eval_loss"], abs=1e-6)
    assert summary["peak_memory_bytes"] > 10**8 and summary["tokens_per_second"] > 0
    weights = 300 * 16  # the embeddings alone
    assert weights < summary["parameters"] < 10 * weights

    assert call_main(file) == 0  # nothing left to train
    assert metrics.read_bytes() == whole
    again = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert again == summary


def test_the_speed_is_the_median_step_s_after_the_warm_up():
    steps = [{"step": s, "tokens": 100 * s, "loss": 1.0, "seconds": 9.0, "memory_bytes": s} for s in range(1, 6)]
    steps += [
        {"step": 6, "tokens": 600, "loss": 2.0, "seconds": 0.5, "memory_bytes": 6},
        {"step": 6, "stream": "eval", "eval_loss": 3.0, "eval_accuracy": 0.5},
        {"step": 7, "tokens": 800, "loss": 2.0, "seconds": 0.5, "memory_bytes": 6},
        {"step": 8, "tokens": 900, "loss": 0.5, "seconds": 5.0, "memory_bytes": 6},
        {"step": 10, "tokens": 950, "loss": 2.0, "seconds": 1e-9, "memory_bytes": 6},  # step 9 is missing
        {"step": 11, "tokens": 1000, "loss": 0.25, "seconds": 0.25, "memory_bytes": 6},
    ]
    expected = {"train_loss": 0.25, "tokens": 1000, "tokens_per_second": 200.0, "peak_memory_bytes": 6}
    assert summarize(steps) == expected | {"data_wait_share": None}
    waited = [line | {"data_seconds": 0.1 * line["seconds"]} for line in steps if "seconds" in line]
    assert summarize(waited)["data_wait_share"] == pytest.approx(0.1)
    assert summarize([])["tokens_per_second"] is None


def test_streams_count_once_each():
    lines = [
        {"step": 3, "stream": "a", "eval_loss": 1.0, "eval_accuracy": 0.2},
        {"step": 3, "stream": "b", "eval_loss": 2.0, "eval_accuracy": 0.4},
        {"step": 4, "stream": "a", "eval_loss": 9.0, "eval_accuracy": 0.0},
    ]
    found = evaluation(lines, 3)
    assert found["loss"] == 1.5 and found["accuracy"] == pytest.approx(0.3)
    assert found["streams"]["b"] == {"loss": 2.0, "accuracy": 0.4}
    assert evaluation(lines, 4) == {"loss": 9.0, "accuracy": 0.0}
    assert evaluation(lines, 5) is None


def test_a_growing_file_is_read_from_its_end(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("")
    assert last_step(path) is None
    rows = [{"step": s, "seconds": 1.0, "filling": "x" * 100} for s in range(200)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 200, "eval_loss": 1.0}\n{"step": 201')
    assert last_step(path)["step"] == 199
    assert len(read_metrics(path)) == 201
