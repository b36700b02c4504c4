"""The benchmark of several ranks: what it launches, and what it makes of a profile."""

import argparse
import contextlib
import importlib
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from anymixer.config import load_config

ROOT = Path(__file__).parents[2]
HYDRA, BERT = (str(ROOT / "yamls" / "pretrain" / name) for name in ("hydra.yaml", "bert.yaml"))


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("scaling")


@pytest.fixture
def scaling_rank(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("scaling_rank")


def options(**changes):
    defaults = {
        "files": [HYDRA],
        "data": "data/wiki",
        "tokenizer": None,
        "ranks": [1, 2, 4],
        "batch": 64,
        "microbatches": 2,
        "steps": 20,
        "profiled": 3,
        "parallel": ["ddp", "fsdp2"],
        "scaling": ["strong", "weak"],
        "device": "cpu",
        "set": [],
    }
    return argparse.Namespace(**(defaults | changes))


def test_one_rank_comes_first_and_weak_scaling_grows_the_batch(scaling):
    found = list(scaling.cases(options()))
    assert len(found) == 9 and (found[0].ranks, found[0].batch, found[0].name) == (1, 64, "hydra 1 rank")
    assert [case.batch for case in found[1:]] == [64, 64, 128, 256, 64, 64, 128, 256]


def test_what_is_asked_for_first_comes_first_for_all_models(scaling):
    found = [
        (case.parallel, case.scaling, case.file) for case in scaling.cases(options(files=[HYDRA, BERT], ranks=[2]))
    ]
    assert found[:4] == [(*one, file) for one in (("none", "one rank"), ("ddp", "strong")) for file in (HYDRA, BERT)]


@pytest.mark.parametrize("file", [HYDRA, BERT])
def test_every_launch_is_of_a_valid_run_without_dropout(scaling, file, tmp_path):
    for case in scaling.cases(options(files=[file])):
        words = scaling.command(case, tmp_path, options())
        overrides = [word for word in words[words.index(file) + 1 :]]
        config = load_config(file, overrides)
        assert config.device_train_microbatch_size * 2 * case.ranks == config.global_train_batch_size == case.batch
        assert bool(config.parallelism_config) == (case.parallel == "fsdp2")
        assert words[words.index("-n") + 1] == str(case.ranks)
        sizes = config.hugging_face_config() if hasattr(config, "hugging_face_config") else None
        model = (sizes or config.model.hugging_face_config()).to_dict()
        dropouts = [value for key, value in model.items() if key.endswith("dropout_prob")]
        assert dropouts and not any(dropouts)
        assert not config.model.mixer.get("dropout")


def event(name, start, end, device=torch.autograd.DeviceType.CUDA, annotation=False):
    times = SimpleNamespace(start=start, end=end)
    return SimpleNamespace(name=name, device_type=device, time_range=times, is_user_annotation=annotation)


def test_what_no_kernel_hides_is_told_apart(scaling_rank):
    cpu = torch.autograd.DeviceType.CPU
    events = [
        event("gemm", 0, 40),
        event("gemm", 50, 60),
        event("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 30, 70),
        event("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 65, 80),
        event("nccl:all_reduce", 0, 100, annotation=True),
        event("FSDP::all_gather", 20, 90, annotation=True),
        event("DistributedDataParallel.forward", 0, 100, annotation=True),
        event("aten::mm", 0, 100, cpu),
        event("gemm", 90, 100),
    ]
    shares = scaling_rank.communication_shares(events, cuda=True)
    assert shares == {"exchanging": pytest.approx(0.5), "alone": pytest.approx(0.3)}


def test_on_a_cpu_it_is_gloo_s_share(scaling_rank):
    cpu = torch.autograd.DeviceType.CPU
    events = [event("gloo:all_reduce", 10, 20, cpu, annotation=True), event("aten::mm", 0, 50, cpu)]
    assert scaling_rank.communication_shares(events, cuda=False) == {"exchanging": pytest.approx(0.2), "alone": None}


def test_efficiency_is_a_rank_s_share_of_one_alone(scaling):
    one, two, *_ = scaling.cases(options())
    alone = scaling.Figures(100.0, 2**30, {1: 4.0, 2: 3.0}, None, None)
    pair = scaling.Figures(190.0, 2**30, {1: 4.0, 2: 3.001}, 0.25, 0.1)
    cells = dict(zip(scaling.COLUMNS, scaling.row(two, pair, alone)))
    assert cells["efficiency"] == "0.950" and cells["largest difference"] == "0.0010"
    assert cells["communicating"] == "25.0%" and cells["alone"] == "10.0%" and cells["parallel"] == "DDP"
    assert dict(zip(scaling.COLUMNS, scaling.row(one, alone, alone)))["efficiency"] == "1.000"
    unknown = dict(zip(scaling.COLUMNS, scaling.row(two, pair, None)))
    assert unknown["tokens/s"] == "190" and unknown["efficiency"] == unknown["largest difference"] == "-"


def test_a_launch_that_takes_too_long_ends_with_all_its_processes(scaling, tmp_path, monkeypatch):
    """One that asks its rank to end, as Composer's launcher does, which does not. Its time is over when both are there,
    and again when the rank was asked."""
    log, signs = tmp_path / "log.txt", iter(("deaf", "asked"))

    class Launcher(subprocess.Popen):
        def wait(self, timeout=None):
            sign = next(signs, None) if timeout is not None else None
            if sign is None:
                return super().wait(timeout)
            while sign not in log.read_text():
                assert self.poll() is None
                time.sleep(0.02)
            raise subprocess.TimeoutExpired(self.args, timeout)

    monkeypatch.setattr(scaling.subprocess, "Popen", Launcher)
    deaf = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
    )
    program = f"""
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
rank = subprocess.Popen([sys.executable, "-c", {deaf!r}])
print("rank", rank.pid, flush=True)
try:
    time.sleep(600)
except KeyboardInterrupt:
    print("asked", flush=True)
    rank.terminate()
    rank.wait()
"""
    with pytest.raises(scaling.LaunchFailed, match=r"(?s)not done after 4 s\n.*asked"):
        scaling.launch([sys.executable, "-c", program], log, 4.0)
    words = log.read_text().split()
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int(words[words.index("rank") + 1])).wait(60)


def test_a_launch_that_fails_loses_its_own_row(scaling, tmp_path, monkeypatch, capsys):
    def measure(case, *_):
        if case.ranks == 2:
            raise scaling.LaunchFailed("exit code 1")
        return scaling.Figures(100.0, 2**30, {1: 4.0}, None, None)

    monkeypatch.setattr(scaling, "measure", measure)
    out = tmp_path / "table.md"
    words = [HYDRA, "--data", "x", "--ranks", "2", "4", "--parallel", "ddp", "--scaling", "weak", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["scaling.py", *words, "--out", str(out)])
    assert scaling.main() == 1
    assert "hydra 2 ranks ddp weak: exit code 1" in capsys.readouterr().out
    assert [line.split("|")[2].strip() for line in out.read_text().splitlines()[-2:]] == ["1", "4"]


def test_the_launcher_finds_a_port_of_its_own(scaling, tmp_path, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "1")
    scaling.launch([sys.executable, "-c", "import os; assert 'MASTER_PORT' not in os.environ"], tmp_path / "log", 60.0)
    assert "--master_port" not in scaling.command(next(scaling.cases(options())), tmp_path, options())
