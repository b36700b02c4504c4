"""Runs in processes of their own: killed in the midst of things, and two ranks under Composer's launcher."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("tiny_run.py")


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}


COMPOSER, TORCHRUN = ["composer", "-n"], ["torch.distributed.run", "--nproc-per-node"]


@pytest.fixture
def start(master_port):
    """Do runs one after the other in one process, or in several that a launcher starts; returns how that ended."""

    def start(
        runs: list[dict[str, Any]], ranks: int = 1, launcher: list[str] = COMPOSER
    ) -> subprocess.CompletedProcess:
        launched = ["-m", *launcher, str(ranks), "--master_port", str(master_port)] if ranks > 1 else []
        command = [sys.executable, *launched, str(SCRIPT), json.dumps(runs)]
        return subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=600)

    return start


def losses(path: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in map(json.loads, path.read_text().splitlines())}


def test_a_killed_run_ends_in_the_same_losses(start, tiny_run, tmp_path):
    """Killed while writing its second checkpoint, then one step after its third, then left to finish."""
    mds = tiny_run.write_shards(tmp_path / "mds")
    changes = {"max_duration": "8ba", "save_interval": "2ba"}
    whole = tiny_run.train(tiny_run.config(**changes), {"mds": mds})

    folder = tmp_path / "run"
    run = {"config": changes | {"save_folder": str(folder), "autoresume": True}}
    attempts = []
    for number, options in enumerate([{"kill_while_saving": 2}, {"kill_after": 7}, {}]):
        out = tmp_path / f"attempt{number}.jsonl"
        attempts.append((start([run | {"options": {"mds": mds} | options, "out": str(out)}]), losses(out)))

    (first, before_save), (second, before_step), (third, rest) = attempts
    assert first.returncode == second.returncode == -signal.SIGKILL
    assert third.returncode == 0, third.stderr
    assert list(before_save) == [1, 2, 3, 4] and list(before_step) == [3, 4, 5, 6, 7] and list(rest) == [7, 8]
    assert f"{folder}/ep0-ba2-rank0.pt; set aside as broken: ep0-ba4-rank0.pt.broken" in second.stdout
    for part in (before_save, before_step, rest):
        assert part == {step: whole[step - 1] for step in part}


def test_two_ranks_train_as_one_and_resume(start, tiny_run, tmp_path):
    """DDP and FSDP2, with whole and with sharded checkpoints: one launch, because starting takes longest."""
    mds = tiny_run.write_shards(tmp_path / "mds")
    runs = {
        "ddp": {"options": {"dropout": 0.0}},
        "ddp-small": {"config": {"device_train_microbatch_size": 1}, "options": {"dropout": 0.0}},
        "fsdp": {"config": fsdp("full"), "options": {"dropout": 0.0}},
    }
    for kind, changes in {"ddp": {}, "full": fsdp("full"), "sharded": fsdp("sharded")}.items():
        changes = changes | {"save_folder": str(tmp_path / kind), "save_interval": "2ba"}
        whole = changes | {"save_folder": None}
        resumed = changes | {"autoresume": True}
        runs[f"{kind}-whole"] = {"config": whole, "options": {"mds": mds}}
        runs[f"{kind}-first"] = {"config": resumed, "options": {"mds": mds, "stop_after": 5}}
        runs[f"{kind}-rest"] = {"config": resumed, "options": {"mds": mds}}
    outs = {name: tmp_path / f"{name}.jsonl" for name in runs}
    done = start([run | {"out": str(outs[name])} for name, run in runs.items()], ranks=2)
    assert done.returncode == 0, done.stderr

    one = tiny_run.train(tiny_run.config(), {"dropout": 0.0})
    for name in ("ddp", "ddp-small", "fsdp"):
        assert list(losses(outs[name]).values()) == pytest.approx(one, abs=1e-5), name
    for kind in ("ddp", "full", "sharded"):
        whole, first, rest = (losses(outs[f"{kind}-{part}"]) for part in ("whole", "first", "rest"))
        assert first == {step: whole[step] for step in range(1, 6)}
        assert rest == {step: whole[step] for step in (5, 6)}
    assert (tmp_path / "sharded" / "ep0-ba4" / ".metadata").is_file()
    assert (tmp_path / "full" / "ep0-ba4-rank0.pt").is_file()


def test_what_two_ranks_began_one_ends(start, tiny_run, tmp_path):
    """DDP, and FSDP2 with whole and with sharded checkpoints; here by torchrun. Whole ones need no FSDP2 to go on."""
    mds = tiny_run.write_shards(tmp_path / "mds")
    options = {"mds": mds, "dropout": 0.0}
    kinds = {"ddp": ({}, {}), "full": (fsdp("full"), {}), "sharded": (fsdp("sharded"), fsdp("sharded"))}
    runs: dict[str, list[dict[str, Any]]] = {"first": [], "rest": []}
    for kind, (on_two, on_one) in kinds.items():
        saving = {"save_folder": str(tmp_path / kind), "save_interval": "2ba", "autoresume": True}
        for part, changes, more in (("first", on_two, {"stop_after": 5}), ("rest", on_one, {})):
            out = str(tmp_path / f"{kind}-{part}.jsonl")
            runs[part].append({"config": changes | saving, "options": options | more, "out": out})
    first, rest = start(runs["first"], ranks=2, launcher=TORCHRUN), start(runs["rest"])
    assert first.returncode == 0, first.stderr
    assert rest.returncode == 0, rest.stderr

    whole = dict(enumerate(tiny_run.train(tiny_run.config(), options), start=1))
    for kind in kinds:
        began, ended = (losses(tmp_path / f"{kind}-{part}.jsonl") for part in ("first", "rest"))
        assert list(began) == [1, 2, 3, 4, 5] and list(ended) == [5, 6], kind
        assert began == pytest.approx({step: whole[step] for step in began}, abs=1e-5), kind
        # torch 2.7's gloo adds up the gradients that FSDP2 asks it to average. Adam does not mind, but its state does,
        # on another number of ranks.
        assert ended == pytest.approx({5: whole[5], 6: whole[6]}, abs=1e-5 if kind == "ddp" else 2e-3), kind


def fsdp(state_dict_type: str) -> dict[str, Any]:
    return {
        "parallelism_config": {"fsdp": {"state_dict_type": state_dict_type}},
        "device_train_microbatch_size": 2,
        "algorithms": {"gradient_clipping": {"clipping_type": "norm", "clipping_threshold": 100.0}},
    }
