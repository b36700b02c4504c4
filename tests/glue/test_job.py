"""Whole jobs: results, repeatability, early stopping, NaN, packing, and Hugging Face's own BERT step by step."""

import json
import subprocess
import sys
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from anymixer.errors import UserError
from anymixer.glue.data import SplitMissing
from anymixer.glue.job import run_job
from anymixer.glue.recorder import LossNotFinite
from anymixer.glue.spec import JobResult, JobSpec
from anymixer.models import ModelConfig, build_model

HF_FIELDS = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
HF_FIELDS |= {"intermediate_size": 24, "max_position_embeddings": 40}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def test_a_job_leaves_all_that_is_promised(make_spec, tmp_path, data):
    result = run_job(make_spec(save_checkpoint=True), tmp_path, "cpu")
    assert [e["step"] for e in result.evaluations] == [3, 6] and result.last == result.evaluations[-1]
    assert result.metrics == result.last["metrics"] and set(result.metrics) == {"rte/accuracy", "rte/loss"}
    assert result.best["score"] == max(e["score"] for e in result.evaluations)
    assert len(result.train_losses) == 6 and result.sizes == {"train": 96, "rte": 24}
    assert result.peak_memory_bytes > 0 and result.seconds > 0 and "torch" in result.versions
    assert result.checkpoint_hash is None and "from_scratch" in result.starting
    lines = (tmp_path / result.predictions["RTE.tsv"]).read_text().splitlines()
    assert lines[0] == "index\tprediction" and len(lines) == 11
    assert {line.split("\t")[1] for line in lines[1:]} <= {"entailment", "not_entailment"}
    assert [int(line.split("\t")[0]) for line in lines[1:]] == list(range(10))
    assert JobResult.from_dict(json.loads(result.to_json())) == result


def test_the_end_is_scored_whatever_the_interval(make_spec, tmp_path):
    for interval, steps in (("4ba", [4, 7]), ("1ep", [6, 7]), ("100ba", [7])):
        result = run_job(make_spec(max_duration="7ba", eval_interval=interval, predict=False), tmp_path, "cpu")
        assert [e["step"] for e in result.evaluations] == steps
        assert [e["epoch"] for e in result.evaluations] == pytest.approx([step / 6 for step in steps])


def test_predictions_are_in_the_order_of_the_test_set(make_spec, tmp_path, data):
    """Each text's answer is that of the kept checkpoint to this text alone."""
    from transformers import AutoTokenizer

    from anymixer.glue.data import load_split
    from anymixer.glue.tasks import TASKS
    from anymixer.models import MixerBertForSequenceClassification

    run_job(make_spec(task="stsb", max_duration="3ba", save_checkpoint=True), tmp_path, "cpu")
    written = (tmp_path / "predictions" / "STS-B.tsv").read_text().splitlines()[1:]
    model = MixerBertForSequenceClassification.from_pretrained(tmp_path / "checkpoint").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "checkpoint")
    texts = load_split(TASKS["stsb"], "test", str(data), labelled=False).texts
    for line, first, second in zip(written, *texts, strict=True):
        with torch.no_grad():
            score = model(**tokenizer(first, second, return_tensors="pt")).logits.item()
        assert float(line.split("\t")[1]) == pytest.approx(min(max(score, 0), 5), abs=1e-3)


def test_the_same_seed_gives_the_same_numbers_and_another_one_others(make_spec, tmp_path):
    spec = make_spec(max_duration="8ba")
    model = json.loads(json.dumps(spec.model))
    model["model_config"]["hidden_dropout_prob"] = 0.1
    spec = replace(spec, model=model)
    one, same = (run_job(spec, tmp_path / name, "cpu") for name in ("one", "same"))
    assert one.train_losses == same.train_losses and one.evaluations == same.evaluations
    other = run_job(replace(spec, seed=4), tmp_path / "other", "cpu")
    assert other.train_losses != one.train_losses


def test_a_model_learns_the_task(make_spec, tmp_path):
    result = run_job(
        make_spec(task="cola", max_duration="20ep", eval_interval="5ep", lr=1e-2, predict=False), tmp_path, "cpu"
    )
    assert result.metrics["cola/matthews_correlation"] > 0.8
    assert result.majority_baseline == {"cola/matthews_correlation": 0.0} and not result.predictions


def test_microbatches_and_packing_change_no_number(make_spec, tmp_path):
    spec = make_spec(max_duration="4ba", eval_interval="4ba", predict=False)
    plain = run_job(spec, tmp_path, "cpu")
    for changes in ({"packing": True}, {"trainer_kwargs": {"device_train_microbatch_size": 3}}):
        other = run_job(replace(spec, **changes), tmp_path, "cpu")
        np.testing.assert_allclose(other.train_losses, plain.train_losses, rtol=1e-4, atol=1e-5)


def test_best_or_last(make_spec, tmp_path):
    """With a learning rate that ruins the model in the end, the best evaluation is not the last."""
    changes = {"task": "cola", "max_duration": "40ba", "eval_interval": "2ba", "lr": 3e-2, "save_checkpoint": True}
    changes |= {"scheduler": {"name": "constant_with_warmup", "t_warmup": "30ba"}, "predict": False}
    best = run_job(make_spec(select="best", **changes), tmp_path / "best", "cpu")
    assert best.score == best.best["score"] and best.metrics == best.best["metrics"]
    assert best.best == max(best.evaluations, key=lambda e: e["score"])
    again = make_spec(
        task="cola",
        starting_point=str(tmp_path / "best" / "checkpoint"),
        tokenizer_name=None,
        lr=1e-12,
        max_duration="1ba",
        eval_interval="1ba",
        predict=False,
    )
    assert "drawn anew: classifier" in run_job(again, tmp_path / "again", "cpu").starting
    with pytest.raises(UserError, match=r"starting_point: .*checkpoint has changed since this job was planned"):
        run_job(replace(again, starting_digest="abc"), tmp_path / "again", "cpu")


def test_early_stopping(make_spec, tmp_path):
    spec = make_spec(max_duration="60ba", eval_interval="2ba", lr=1e-9, early_stopping={"patience": 3}, predict=False)
    result = run_job(spec, tmp_path, "cpu")
    assert [e["step"] for e in result.evaluations] == [2, 4, 6, 8] and len(result.train_losses) == 8


def test_a_loss_that_is_nan_is_no_result(make_spec, tmp_path):
    with pytest.raises(LossNotFinite, match=r"rte: the loss is (nan|inf) at step \d+ \(learning rate .*\)"):
        run_job(make_spec(task="rte", lr=1e30, max_duration="6ba"), tmp_path, "cpu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"from_scratch": False}, "starting_point: not set; name a checkpoint, or set from_scratch=true"),
        ({"from_scratch": True, "starting_point": "x"}, "from_scratch: contradicts starting_point"),
        ({"starting_point": "job:mnli-seed1-abc"}, "has no checkpoint yet"),
        ({"task": "sst"}, "task.sst: unknown task; did you mean 'sst2'"),
        ({"trainer_kwargs": {"save_folder": "x"}}, "trainer_kwargs.save_folder: not a key"),
        ({"trainer_kwargs": {"compil": True}}, "trainer_kwargs.compil: .*did you mean 'compile'"),
        ({"callbacks": {"lr_monitr": {}}}, "callbacks.lr_monitr"),
        ({"scheduler": {"t_warmp": "1ba"}}, "scheduler.t_warmp: unknown key"),
        ({"eval_interval": "0ba"}, "eval_interval: 0 would never score"),
        ({"pooling": "max"}, "pooling: 'max' is none of cls, mean"),
        ({"early_stopping": {"patience": 0}}, "early_stopping.patience"),
        ({"precision": "amp_bf16"}, "precision: amp_bf16 needs a GPU"),
        ({"tokenizer_name": None}, "tokenizer_name: not set, and from_scratch has none"),
        ({"data_digest": "abc"}, "data_local: .* has changed since this job was planned"),
    ],
)
def test_mistakes_are_found_before_training(make_spec, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        run_job(make_spec(**changes), tmp_path, "cpu")
    assert not any(tmp_path.iterdir())


def test_a_task_without_data_says_so(make_spec, tmp_path):
    with pytest.raises(SplitMissing, match="qnli: no train split"):
        run_job(make_spec(task="qnli"), tmp_path, "cpu")


def test_the_id_follows_what_changes_the_numbers(make_spec):
    spec = make_spec(data_digest="abc")
    assert spec.job_id.startswith("rte-seed3-") and len(spec.job_id) == len("rte-seed3-") + 8
    for changes in (
        {"device": "gpu:3"},
        {"data_local": "/elsewhere"},
        {"save_checkpoint": True},
        {"loggers": {"x": 1}},
    ):
        assert replace(spec, **changes).job_id == spec.job_id
    for changes in (
        {"lr": 2e-3},
        {"seed": 4},
        {"data_digest": "abd"},
        {"starting_digest": "a"},
        {"max_sequence_length": 8},
    ):
        assert replace(spec, **changes).job_id != spec.job_id
    assert JobSpec.from_json(spec.to_json()).job_id == spec.job_id


def test_a_job_as_a_process(make_spec, tmp_path, child_environment):
    spec_file, folder = tmp_path / "spec.json", tmp_path / "job"
    spec = make_spec(max_duration="2ba", eval_interval="2ba")
    command = [sys.executable, "-m", "anymixer.glue.job", str(spec_file), str(folder)]

    def start(spec):
        spec_file.write_text(spec.to_json())
        return subprocess.run(command, capture_output=True, text=True, timeout=300)

    done = start(spec)
    assert done.returncode == 0, done.stdout + done.stderr
    result = JobResult.from_dict(json.loads((folder / "result.json").read_text()))
    assert result.job_id == spec.job_id and "all weights drawn at random" in done.stdout
    mistake = start(replace(spec, task="qnli"))
    assert mistake.returncode == 2 and mistake.stderr.splitlines()[-1].startswith("error: qnli: no train split")


@pytest.fixture
def hf_checkpoint(tmp_path, tokenizer):
    """A BERT of transformers, as pretraining would leave it."""
    torch.manual_seed(5)
    model = build_model(ModelConfig(name="hf_bert", model_config=HF_FIELDS | NO_DROPOUT))
    model.save_pretrained(tmp_path / "hf")
    tokenizer.save_pretrained(str(tmp_path / "hf"))
    return tmp_path / "hf"


def test_attention_with_bert_s_weights_trains_as_hugging_face_s_bert(make_spec, tmp_path, hf_checkpoint):
    """The same batches, dropout 0: the loss of each of the first 100 steps."""
    theirs = ModelConfig(name="hf_bert", model_config=HF_FIELDS | NO_DROPOUT)
    ours = ModelConfig(
        mixer={"name": "attention", "num_heads": 2},
        model_config={
            "vocab_size": 32,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "channel_mixer": {"name": "mlp", "intermediate_size": 24},
            "position_embeddings": "learned",
            "max_position_embeddings": 40,
            "norm_eps": 1e-12,
            "hidden_dropout_prob": 0.0,
        },
    )
    common = {"starting_point": str(hf_checkpoint), "tokenizer_name": None, "predict": False, "lr": 2e-3}
    common |= {"max_duration": "100ba", "eval_interval": "50ba"}
    one, other = (
        run_job(make_spec(model=asdict(model), **common), tmp_path / name, "cpu")
        for name, model in (("theirs", theirs), ("ours", ours))
    )
    assert len(one.train_losses) == 100 and "a Hugging Face BERT" in other.starting
    np.testing.assert_allclose(other.train_losses, one.train_losses, rtol=0, atol=1e-4)
    assert np.ptp(one.train_losses) > 0.05
    assert other.metrics["rte/accuracy"] == one.metrics["rte/accuracy"]
