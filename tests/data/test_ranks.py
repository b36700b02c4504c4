"""The samples and masks of a global batch do not depend on how many ranks share it."""

import multiprocessing
import os
import socket
import sys

import pytest
import torch

from anymixer.data import DatasetConfig, LoaderConfig, build_loader

pytest.importorskip("composer")
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or torch.cuda.is_available(), reason="forks, which CUDA does not survive"
)


def batches(local, tokenizer, ranks: int, state: dict | None, train: bool) -> list[torch.Tensor]:
    """Return two epochs of this rank's batches, each `[batch, 2, length]`: input ids and labels."""
    config = LoaderConfig(num_workers=ranks - 1, dataset=DatasetConfig(local=str(local), max_seq_len=32))
    loader = build_loader(config, tokenizer, device_batch_size=8 // ranks, seed=5, train=train).dataloader
    if state is not None:
        loader.load_state_dict(state)
    return [torch.stack([b["input_ids"], b["labels"]], dim=1) for _ in range(2) for b in loader]


def run_rank(rank: int, port: int, send, *arguments) -> None:
    os.environ.update(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", RANK=str(rank), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo")
    send.send([batch.numpy() for batch in batches(*arguments)])
    torch.distributed.destroy_process_group()


def on_two_ranks(*arguments) -> list[torch.Tensor]:
    """Return the global batches of two ranks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    pipes = [context.Pipe(duplex=False) for _ in range(2)]
    processes = [
        # Not daemonic: they have workers of their own.
        context.Process(target=run_rank, args=(rank, port, pipes[rank][1], *arguments))
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    try:
        assert all(receive.poll(60) for receive, _ in pipes)
        shares = [receive.recv() for receive, _ in pipes]
    finally:
        for process in processes:
            process.join(20)
            process.kill()
    return [torch.cat([torch.from_numpy(share[step]) for share in shares]) for step in range(len(shares[0]))]


def as_sets(global_batches: list[torch.Tensor]) -> list[set[bytes]]:
    return [{row.numpy().tobytes() for row in batch} for batch in global_batches]


def test_two_ranks_read_what_one_reads(token_data, tokenizer):
    one = batches(token_data, tokenizer, 1, None, True)
    two = on_two_ranks(token_data, tokenizer, 2, None, True)
    assert as_sets(two) == as_sets(one)


def test_two_ranks_continue_what_one_began(token_data, tokenizer):
    state = {"epoch": 0, "sample_in_epoch": 24, "num_canonical_nodes": 1, "shuffle_seed": 9176}
    one = batches(token_data, tokenizer, 1, state, True)
    whole = batches(token_data, tokenizer, 1, None, True)
    assert as_sets(one) == as_sets(whole[3:])
    assert as_sets(on_two_ranks(token_data, tokenizer, 2, state, True)) == as_sets(one)
