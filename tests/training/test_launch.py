import dataclasses

import anymixer_kernels
import pytest
import torch

from anymixer.errors import UserError
from anymixer.training import trainer_config
from anymixer.training.launch import plan_launch, save_folder, saves_shards


@pytest.fixture
def ranks(monkeypatch):
    """Pretend that Composer's launcher started this many ranks."""

    def start(number: int) -> None:
        for name, value in {
            "WORLD_SIZE": number,
            "LOCAL_WORLD_SIZE": number,
            "RANK": 0,
            "LOCAL_RANK": 0,
        }.items():
            monkeypatch.setenv(name, str(value))

    return start


def test_auto_on_a_cpu(tiny_run):
    plan = plan_launch(tiny_run.config(global_train_batch_size=256))
    assert (plan.device, plan.precision) == ("cpu", "fp32")
    assert plan.device_train_microbatch_size == plan.device_train_batch_size == 256
    assert plan.device_eval_batch_size == 128


def test_auto_on_a_gpu(tiny_run, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr("anymixer_kernels.backend.triton_problem", {"cuda": None}.get)
    config = tiny_run.config(device=None)
    plan = plan_launch(config)
    assert (plan.device, plan.precision, plan.device_train_microbatch_size) == ("gpu", "amp_bf16", "auto")
    assert "precision amp_bf16 (auto)" in plan.describe(config)


@pytest.mark.parametrize(
    ("changes", "number", "used"),
    [
        ({}, 1, True),
        ({}, 2, False),
        ({"compile": True}, 1, False),
        ({"parallelism_config": {"fsdp": {}}, "device_train_microbatch_size": 4}, 1, False),
        ({"cuda_graphs": True}, 2, True),
        ({"cuda_graphs": False}, 1, False),
    ],
)
def test_cuda_graphs_are_chosen_where_one_process_trains(tiny_run, ranks, monkeypatch, changes, number, used):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("anymixer_kernels.backend.triton_problem", {"cuda": None}.get)
    ranks(number)
    config = tiny_run.config(**{"device": None, "cuda_graphs": "auto"} | changes)
    plan = plan_launch(config)
    assert plan.cuda_graphs == used
    assert (", CUDA graphs" in plan.describe(config)) == used


def test_a_cpu_has_no_cuda_graphs(tiny_run):
    assert not plan_launch(tiny_run.config(cuda_graphs="auto")).cuda_graphs
    with pytest.raises(UserError, match=r"^cuda_graphs: needs a GPU, but this run is on 'cpu'"):
        plan_launch(tiny_run.config(cuda_graphs=True))
    with pytest.raises(UserError, match=r"^cuda_graphs: 'always' is none of true, false, auto"):
        tiny_run.config(cuda_graphs="always")


def test_batches_are_shared_by_the_ranks(tiny_run, ranks):
    ranks(4)
    plan = plan_launch(tiny_run.config(global_train_batch_size=64, device_train_microbatch_size=100))
    assert (plan.device_train_batch_size, plan.device_train_microbatch_size) == (16, 16)
    plan = plan_launch(tiny_run.config(global_eval_batch_size=32))
    assert plan.device_eval_batch_size == 8
    plan = plan_launch(tiny_run.config(global_eval_batch_size=32, device_eval_batch_size=5))
    assert plan.device_eval_batch_size == 5


@pytest.mark.parametrize(
    ("changes", "number", "message"),
    [
        ({"global_train_batch_size": 10}, 4, "^global_train_batch_size: 10 .* 4 ranks; use e.g. 8 or 12"),
        ({"global_eval_batch_size": 3}, 4, "^global_eval_batch_size: 3 .*; use e.g. 4"),
        ({"device": "gpu"}, 1, "^device: gpu, but torch sees no CUDA device"),
        ({"precision": "amp_bf16"}, 1, "^precision: amp_bf16 needs a GPU"),
    ],
)
def test_what_this_machine_cannot_do_is_refused(tiny_run, ranks, monkeypatch, changes, number, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ranks(number)
    with pytest.raises(UserError, match=message):
        plan_launch(tiny_run.config(**changes))


def test_more_ranks_than_gpus_are_refused(tiny_run, ranks, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    ranks(4)
    with pytest.raises(UserError, match=r"^device: 4 ranks on this machine but 2 GPUs; start with: composer -n 2"):
        plan_launch(tiny_run.config(device="gpu"))


def test_a_folder_of_another_run_is_refused(tiny_run, tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "ep0-ba5-rank0.pt").touch()
    changes = {"save_folder": str(tmp_path / "{run_name}")}
    with pytest.raises(UserError, match=r"^save_folder: .*ep0-ba5-rank0.pt.*autoresume=true"):
        plan_launch(tiny_run.config(**changes))
    plan_launch(tiny_run.config(**changes, autoresume=True))
    plan_launch(tiny_run.config(**changes, save_overwrite=True))
    plan_launch(tiny_run.config(**changes, load_path="elsewhere.pt"))


def test_where_and_how_checkpoints_are_written(tiny_run, tmp_path):
    assert save_folder(tiny_run.config()) is None
    assert save_folder(tiny_run.config(save_folder="s3://bucket/x")) is None
    assert save_folder(tiny_run.config(save_folder=str(tmp_path / "{run_name}"))) == tmp_path / "tiny"
    fsdp = {"parallelism_config": {"fsdp": {"state_dict_type": "sharded"}}, "device_train_microbatch_size": 1}
    assert saves_shards(tiny_run.config(**fsdp)) and not saves_shards(tiny_run.config())


@pytest.mark.parametrize("backend", ["triton", "mamba_ssm"])
def test_a_backend_that_cannot_run_is_refused(tiny_run, monkeypatch, backend):
    monkeypatch.setattr(f"anymixer_kernels.backend.{backend}_problem", lambda device: "it is out today")
    with pytest.raises(UserError, match=r"^backend: it is out today"):
        plan_launch(tiny_run.config(backend=backend))
    plan_launch(tiny_run.config(backend="auto"))


def test_what_auto_takes_is_said_with_its_reason(tiny_run, monkeypatch):
    def described(device, backend="auto"):
        config = tiny_run.config(backend=backend)
        return dataclasses.replace(plan_launch(tiny_run.config()), device=device).describe(config)

    problems = {"cuda": None}
    monkeypatch.setattr("anymixer_kernels.backend.triton_problem", problems.get)
    assert "mixing ops torch (auto: no GPU)," in described("cpu")
    assert "mixing ops triton (auto)," in described("gpu")
    problems["cuda"] = "Triton is not installed"
    assert "mixing ops torch (auto: Triton is not installed)," in described("gpu")
    assert "mixing ops reference," in described("gpu", "reference")


def test_the_backends_are_those_of_the_kernels():
    assert trainer_config.BACKENDS == anymixer_kernels.BACKENDS


def test_mamba_ssm_on_a_cpu_is_refused(tiny_run):
    with pytest.raises(UserError, match=r"^backend: mamba-ssm does not run on 'cpu'"):
        plan_launch(tiny_run.config(backend="mamba_ssm"))
