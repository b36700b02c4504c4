import fcntl
import multiprocessing
import os
import signal
import sys
from contextlib import contextmanager, nullcontext, suppress
from multiprocessing import resource_tracker
from pathlib import Path

import pytest
import torch

from anymixer.data import DatasetConfig, LoaderConfig, build_loader
from anymixer.data.shared_memory import _START_LOCK, SHARED_MEMORY, claim, clear_stale, starting_alone
from anymixer.errors import UserError

pytestmark = [
    pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="the system does not list its shared memory"),
    pytest.mark.skipif(
        sys.platform != "linux" or torch.cuda.is_available(), reason="forks, which CUDA does not survive"
    ),
]
pytest.importorskip("composer")
prefix = pytest.importorskip("streaming.base.shared.prefix")


def start(local: Path, remote: Path | None, tokenizer) -> int:
    """Build a loader, read from it, and return the number of its segments."""
    dataset = DatasetConfig(local=str(local), remote=remote and str(remote), max_seq_len=32)
    config = LoaderConfig(num_workers=0, dataset=dataset)
    loader = build_loader(config, tokenizer, device_batch_size=8, seed=1, train=True).dataloader
    next(iter(loader))
    return loader.dataset._shm_prefix_int


@contextmanager
def nobody_starts():
    """Hold up all other runs on this machine, tests in another process among them: each clears what is stale."""
    with open(SHARED_MEMORY / _START_LOCK, "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run_for_ever(send, *arguments) -> None:
    try:
        send.send(start(*arguments))
    except BaseException as error:
        send.send(repr(error))
    signal.pause()


@pytest.fixture
def running():
    """Start runs in processes of their own; give (pid, number) of each; kill them at the end.

    They share the resource tracker of this process, which outlives them: one of a run's own would remove the
    segments of a killed run at some later moment, here as when a whole container is killed and it is not there.
    """
    resource_tracker.ensure_running()
    context = multiprocessing.get_context("fork")
    started = []

    def run(*arguments):
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=run_for_ever, args=(send, *arguments), daemon=True)
        process.start()
        started.append(process)
        assert receive.poll(300)
        number = receive.recv()
        assert isinstance(number, int), number
        return process, number

    yield run
    for process in started:
        process.kill()
        process.join()
    with nobody_starts():
        clear_stale()


def kill(process) -> None:
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def segments(number: int) -> list[Path]:
    return sorted(SHARED_MEMORY.glob(f"{number:06}_*"))


@pytest.mark.parametrize("with_remote", [False, True])
def test_a_killed_run_does_not_block_the_next(token_data, tokenizer, tmp_path, running, with_remote):
    places = (tmp_path / "cache", token_data) if with_remote else (token_data, None)
    killed, number = running(*places, tokenizer)
    with nobody_starts():
        kill(killed)
        assert segments(number), "a killed process leaves its segments when no resource tracker outlives it"
        inode = (SHARED_MEMORY / f"{number:06}_locals").stat().st_ino
    again, new_number = running(*places, tokenizer)
    assert again.is_alive()
    left = None
    with suppress(FileNotFoundError):
        left = (SHARED_MEMORY / f"{number:06}_locals").stat().st_ino
    assert new_number == number or left != inode


def test_a_live_run_is_not_touched(token_data, tokenizer, running):
    live, number = running(token_data, None, tokenizer)
    before = segments(number)
    with nobody_starts():
        assert number not in clear_stale()
    _, other = running(token_data, None, tokenizer)
    assert segments(number) == before and other != number
    with nobody_starts():
        kill(live)
        assert number in clear_stale() and not segments(number)


@pytest.mark.parametrize(("other", "refused"), [("here", True), ("elsewhere", False)])
def test_two_launchers_of_a_run_need_two_machines(other, refused, monkeypatch):
    def gather(seen, own):
        seen[:] = [own, (own[0] if other == "here" else other, 1)]

    answers = {"is_initialized": True, "get_world_size": 2, "barrier": None}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.distributed, name, lambda answer=answer: answer)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    expected = pytest.raises(UserError, match=r"node_rank: 0 and 1 .*composer -n 2") if refused else nullcontext()
    with expected, starting_alone(node=0, leader=True):
        assert not refused


@pytest.mark.parametrize("found", [7, ValueError("Reused local directory")])
def test_all_ranks_take_what_their_node_s_leader_finds(found, monkeypatch):
    def gather(seen, own):
        is_place = isinstance(own[0], tuple)
        seen[:] = [own, own, own] if is_place else [(1, 3), (0, found), own]

    answers = {"is_initialized": True, "get_world_size": 3, "barrier": None}
    for name, answer in answers.items():
        monkeypatch.setattr(torch.distributed, name, lambda answer=answer: answer)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    before = prefix._check_and_find_retrying
    with starting_alone(node=0, leader=False):
        expected = nullcontext() if found == 7 else pytest.raises(ValueError, match="Reused")
        with expected:
            assert prefix._check_and_find_retrying(["data"], [None], shm_name="locals", retry=1) == 7
    assert prefix._check_and_find_retrying is before


def test_what_was_looked_at_is_not_kept_open(token_data, tokenizer, running):
    _, number = running(token_data, None, tokenizer)
    start(token_data, None, tokenizer)
    opened = []
    for link in (*Path("/proc/self/fd").iterdir(), *Path("/proc/self/map_files").iterdir()):
        with suppress(OSError):
            opened.append(os.readlink(link))
    assert any("/dev/shm/" in target for target in opened)
    assert not any(f"/dev/shm/{number:06}_" in target for target in opened)


@pytest.fixture
def own_number():
    """A number no run has, with a segment for it; nothing else clears it meanwhile."""
    number = 900_000 + os.getpid() % 100_000
    segment = SHARED_MEMORY / f"{number:06}_locals"
    with nobody_starts():
        segment.write_bytes(b"x")
        yield number, segment
        for path in segments(number):
            path.unlink()


def test_segments_without_a_claim_are_not_touched(own_number):
    number, segment = own_number
    assert number not in clear_stale() and segment.exists()


def test_a_number_taken_over_by_another_program_is_not_touched(own_number):
    number, segment = own_number
    context = multiprocessing.get_context("fork")
    claimer = context.Process(target=claim, args=(number,))
    claimer.start()
    claimer.join()
    replacement = segment.with_name(f"{number:06}_replacement")
    replacement.write_bytes(b"y")
    replacement.rename(segment)  # another inode
    assert number not in clear_stale() and segment.read_bytes() == b"y"
    assert not (SHARED_MEMORY / f"{number:06}_anymixer").exists()
