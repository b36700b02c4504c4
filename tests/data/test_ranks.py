"""A global batch, its rows and their masks, is a function of (seed, epoch, step) alone.

Compared as sets: which rank and which place in its batch a row gets does depend on the number of ranks.
"""

import multiprocessing
import os
import sys
import tempfile
from itertools import islice

import numpy as np
import pytest
import torch

from anymixer.data import DatasetConfig, LoaderConfig, StreamConfig, build_loader

pytest.importorskip("composer")
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or torch.cuda.is_available(), reason="forks, which CUDA does not survive"
)

GLOBAL_BATCH = 8


def batches(tokenizer, job, ranks=1):
    """Return this rank's batches `[rows, 3, length]` (input ids, labels, attention mask) and where they end.

    job: data (folder, or streams), steps (None: two epochs), and optionally state, train, workers.
    """
    data = job["data"]
    places = {"streams": data} if isinstance(data, dict) else {"local": str(data)}
    settings = {"max_seq_len": 32, **places, **job.get("dataset", {})}
    config = LoaderConfig(num_workers=job.get("workers", 0), dataset=DatasetConfig(**settings))
    spec = build_loader(
        config, tokenizer, device_batch_size=GLOBAL_BATCH // ranks, seed=5, train=job.get("train", True)
    )
    loader = spec.dataloader
    if job.get("state") is not None:
        loader.load_state_dict(job["state"])
    epochs = (batch for _ in range(job.get("epochs", 2)) for batch in loader)
    found = [columns(batch) for batch in islice(epochs, job.get("steps"))]
    # As Composer asks, counting from the beginning of the epoch.
    done = len(found) * GLOBAL_BATCH
    return found, loader.dataset.state_dict(done + job.get("done", 0), True)


def columns(batch) -> np.ndarray:
    mask = batch.get("attention_mask", torch.ones_like(batch["labels"]))  # none where no row is padded
    return torch.stack([batch["input_ids"], batch["labels"], mask], dim=1).numpy()


def run_rank(rank: int, ranks: int, meeting: str, send, tokenizer, jobs) -> None:
    os.environ.update(WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks), RANK=str(rank), LOCAL_RANK=str(rank))
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    try:
        send.send([batches(tokenizer, job, ranks) for job in jobs])
    except BaseException as error:
        send.send(repr(error))
    torch.distributed.destroy_process_group()


def on_ranks(ranks: int, tokenizer, jobs):
    """Return, per job, the global batches of several ranks and the state they end in."""
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(ranks)]
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            # Not daemonic: they have workers of their own.
            context.Process(target=run_rank, args=(rank, ranks, f"{folder}/ranks", pipes[rank][1], tokenizer, jobs))
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        try:
            assert all(receive.poll(300) for receive, _ in pipes)
            shares = [receive.recv() for receive, _ in pipes]
        finally:
            for process in processes:
                process.join(60)
                process.kill()
                process.join()
    assert not any(isinstance(share, str) for share in shares), shares
    return [
        ([np.concatenate(parts) for parts in zip(*(found for found, _ in job), strict=True)], job[0][1])
        for job in zip(*shares, strict=True)
    ]


def as_sets(global_batches) -> list[set[bytes]]:
    return [{row.tobytes() for row in batch} for batch in global_batches]


@pytest.fixture(params=["full", "packed", "mixture"])
def data(request, token_data, packed_data):
    if request.param == "mixture":
        return {
            "full": StreamConfig(local=str(token_data), proportion=0.7),
            "packed": StreamConfig(local=str(packed_data), proportion=0.3),
        }
    return token_data if request.param == "full" else packed_data


@pytest.mark.parametrize("ranks", [2, 4])
def test_several_ranks_read_what_one_reads(data, tokenizer, ranks):
    """Two epochs; the ranks have 0, 1 and 3 workers each."""
    one, _ = batches(tokenizer, {"data": data})
    assert len(one) > 8 and len(as_sets(one)[0]) == GLOBAL_BATCH
    jobs = [{"data": data, "workers": workers} for workers in ((0, 3) if ranks == 2 else (1,))]
    for found, _ in on_ranks(ranks, tokenizer, jobs):
        assert as_sets(found) == as_sets(one)


@pytest.mark.parametrize("workers", [0, 1, 2, 3])
def test_workers_change_nothing_not_even_the_order(data, tokenizer, workers):
    one, _ = batches(tokenizer, {"data": data})
    found, _ = batches(tokenizer, {"data": data, "workers": workers})
    assert len(one) == len(found) and all((a == b).all() for a, b in zip(one, found))


def test_one_process_then_two_then_one(data, tokenizer):
    """Each stops in mid-epoch; the next goes on from the state the former left."""
    whole, _ = batches(tokenizer, {"data": data})
    first, state = batches(tokenizer, {"data": data, "steps": 3, "workers": 2})
    ((second, state),) = on_ranks(2, tokenizer, [{"data": data, "steps": 2, "done": 24, "state": state, "workers": 1}])
    third, _ = batches(tokenizer, {"data": data, "state": state})
    assert as_sets([*first, *second, *third]) == as_sets(whole)


@pytest.mark.parametrize("ranks", [2, 4])
def test_an_evaluation_counts_every_row_once(token_data, tokenizer, ranks):
    """Ranks read equally many rows, some of them twice, but the second time nothing is predicted."""
    job = {"data": token_data, "train": False, "epochs": 1}
    one, _ = batches(tokenizer, job)
    ((found, _),) = on_ranks(ranks, tokenizer, [job])
    one, found = np.concatenate(one), np.concatenate(found)
    assert len(one) % ranks, "the test needs rows that do not come out even"
    counted = found[(found[:, 1] != -100).any(axis=1)]
    assert len(found) > len(one) == len(counted)
    assert as_sets([one]) == as_sets([counted])


def partition(size: int, paths: int, nodes: int, per_node: int, workers: int = 2, batch: int = 4, done: int = 0):
    """Streaming's own shares of an epoch: `[nodes, ranks, rows of a rank in their order]`, -1 where there is none."""
    from streaming.base.partition import get_partitions

    shares = get_partitions("orig", size, paths, nodes, per_node, workers, batch, done)
    return shares.transpose(0, 1, 3, 2, 4).reshape(nodes, per_node, -1)


@pytest.mark.parametrize(("nodes", "per_node"), [(1, 1), (1, 4), (2, 2), (4, 1), (3, 2)])
@pytest.mark.parametrize("done", [0, 24])
def test_repeated_rows_are_known_by_their_place_on_any_number_of_machines(nodes, per_node, done):
    from streaming.base.world import World

    from anymixer.data.text_loader import places

    for size in range(60, 75):
        counted = []
        shares = partition(size, 1, nodes, per_node, done=done)
        for node, rank in np.ndindex(nodes, per_node):
            world = World(num_nodes=nodes, ranks_per_node=per_node, workers_per_rank=1, worker=node * per_node + rank)
            rows = shares[node, rank][shares[node, rank] >= 0]
            counted += rows[(places(torch.arange(len(rows)), world) < size - done).numpy()].tolist()
        assert sorted(counted) == list(range(done, size))


@pytest.mark.parametrize("rows", [3_000, 30_000_000])
def test_the_order_of_an_epoch_is_the_same_on_1_to_64_machines(rows):
    from types import SimpleNamespace

    from anymixer.data.loader import _canonical_nodes

    dataset = SimpleNamespace(epoch_size=rows, shuffle=True)
    paths = {nodes: _canonical_nodes(dataset, nodes) for nodes in (1, 2, 4, 8, 16, 32, 64)}
    assert set(paths.values()) == {64 if rows > 64_000 else 1}
    assert _canonical_nodes(dataset, 3) % 3 == 0 or _canonical_nodes(dataset, 3) == 1
    global_batch = 64
    for nodes in (1, 2, 4):
        shares = partition(6_400, paths[nodes], nodes, 2, batch=global_batch // nodes // 2)
        steps = shares.reshape(nodes * 2, -1, global_batch // nodes // 2).transpose(1, 0, 2).reshape(-1, global_batch)
        if nodes == 1:
            expected = [set(step) for step in steps.tolist()]
        assert [set(step) for step in steps.tolist()] == expected
