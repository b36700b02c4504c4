"""Composer never opens a checkpoint that could run code."""

import os
import pickle
import warnings

import pytest
import torch
from torch.distributed import checkpoint

from anymixer.errors import UserError
from anymixer.models.checkpoint_weights import RefusedCheckpoint
from anymixer.training.checkpoint_guard import HOOK, check_harmless, check_name, install, is_harmless
from anymixer.training.checkpoints import check_load_path, recover

MARK = "this_ran"
EVIL_ALGORITHM = f"Alibi(max_sequence_length=__import__('os').mkdir('{MARK}'))"


class RunsCode:
    def __reduce__(self):
        return (os.mkdir, (MARK,))


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(HOOK, raising=False)
    yield
    assert not (tmp_path / MARK).exists()


def save(path, **state):
    torch.save({"state": {"model": {"model.weight": torch.ones(3)}, **state}, "rng": []}, path)
    return path


def save_shards(folder, **state):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        content = {"state": {"model": {"weight": torch.ones(3)}, **state}}
        checkpoint.save(content, storage_writer=checkpoint.FileSystemWriter(folder), no_dist=True)
    return folder


def algorithms(text):
    return [("Alibi", {"repr": text})]


def test_files_and_shards_that_would_run_code_are_refused(tmp_path):
    for state in ({"callbacks": RunsCode()}, {"algorithms": algorithms(EVIL_ALGORITHM)}):
        path = save(tmp_path / "ep0-ba1-rank0.pt", **state)
        for check in (check_load_path, lambda p: recover(tmp_path), is_harmless):
            with pytest.raises(RefusedCheckpoint, match="is refused"):
                check(str(path))
        path.unlink()
        folder = save_shards(tmp_path / "ep0-ba2", **state)
        with pytest.raises(RefusedCheckpoint, match=r"load_path: .*is refused"):
            check_load_path(str(folder), sharded=True)
        shard = next(folder.glob("*.distcp"))
        with pytest.raises(RefusedCheckpoint, match="is refused"):
            is_harmless(shard, [(0, 1)])
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()


@pytest.mark.parametrize(
    ("text", "harmless"),
    [
        ("EMA(half_life='1000ba', smoothing=None)", True),
        ("GatedLinearUnits(act_fn=act_fn,gated_layer_bias=False,non_gated_layer_bias=False)", True),
        ("LowPrecisionLayerNorm(apply_at=Event.INIT)", True),
        ("<composer.algorithms.sam.SAM object at 0x7f>", True),
        (EVIL_ALGORITHM, False),
        ("Alibi(1) or print(1)", False),
        ("Alibi(**{'a': print(1)})", False),
        ("alibi.os.system('ls')", False),
        ("Alibi(x=(lambda: 1)())", False),
        ("Alibi(x=[a for a in ()])", False),
        (7, False),
    ],
)
def test_algorithms_are_calls_with_plain_values(tmp_path, text, harmless):
    path = save(tmp_path / "a.pt", algorithms=algorithms(text))
    if harmless:
        check_harmless(path, "key")
        return
    with pytest.raises(RefusedCheckpoint, match=r"key: .*an algorithm of it is code"):
        check_harmless(path, "key")


def test_archives_are_not_unpacked():
    for name in ("s3://bucket/x.tar", "x.pt.gz", "x.tgz"):
        with pytest.raises(UserError, match="is an archive"):
            check_name(name, "load_path")
    check_load_path("s3://bucket/x.pt")


def test_another_hook_is_not_replaced(monkeypatch):
    install()
    install()
    monkeypatch.setenv(HOOK, "os.path.exists")
    with pytest.raises(UserError, match=f"{HOOK}: set to os.path.exists"):
        install()


def test_composer_refuses_what_it_fetched_itself(tiny_run, tmp_path, monkeypatch):
    """A file that only Composer sees, as one from an object store: our own check of the path is left out."""
    from anymixer.training import trainer

    monkeypatch.setattr(trainer, "check_load_path", lambda *_, **__: None)
    for state in ({"callbacks": RunsCode()}, {"algorithms": algorithms(EVIL_ALGORITHM)}):
        path = save(tmp_path / "fetched.pt", **state)
        with pytest.raises(UserError, match=r"^load_path: .*fetched\.pt: .* is refused"):
            tiny_run.train(tiny_run.config(load_path=str(path)))


@pytest.fixture
def bucket(s3_client):
    """An S3 client, with a bucket called `them`."""
    s3_client.create_bucket(Bucket="them")
    return s3_client


def test_composer_refuses_what_it_fetched_from_an_object_store(tiny_run, tmp_path, bucket):
    bucket.upload_file(str(save(tmp_path / "a.pt", callbacks=RunsCode())), "them", "a.pt")
    with pytest.raises(UserError, match=r"^load_path: s3://them/a\.pt: .* is refused"):
        tiny_run.train(tiny_run.config(load_path="s3://them/a.pt"))


@pytest.fixture
def process_group():
    """Whatever a run of one rank sets up is gone after the test."""
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("evil", ["index", "object"])
def test_composer_refuses_shards_that_it_fetched(tiny_run, tmp_path, bucket, process_group, evil):
    weights = {f"model.{name}": value for name, value in tiny_run.model().state_dict().items()}
    folder = save_shards(tmp_path / "ep0-ba1", model=weights, callbacks=RunsCode() if evil == "object" else 1)
    if evil == "index":
        (folder / ".metadata").write_bytes(pickle.dumps(RunsCode()))
    for file in folder.iterdir():
        bucket.upload_file(str(file), "them", f"run/ep0-ba1/{file.name}")
    made = tiny_run.config(
        load_path="s3://them/run/ep0-ba1",
        load_weights_only=True,
        parallelism_config={"fsdp": {"state_dict_type": "sharded"}},
        device_train_microbatch_size=8,
    )
    with pytest.raises(UserError, match=r"^load_path: s3://them/run/ep0-ba1: .* is refused"):
        tiny_run.train(made)
