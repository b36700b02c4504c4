"""A run small enough for tests, in this process or started by Composer's launcher.

    python -m composer -n 2 tests/training/tiny_run.py \\
        '[{"config": {"max_duration": "6ba"}, "options": {"kill_after": 3}, "out": "losses.jsonl"}]'

Each run writes a {"step", "loss"} line per step (rank 0); losses have all their digits.
"""

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from composer.core import Callback, DataSpec, State
from composer.loggers import Logger
from composer.utils import dist
from torch.utils.data import DataLoader, Dataset
from transformers import BertConfig, BertForMaskedLM

from anymixer.training import OptimizerConfig, SchedulerConfig, TrainerConfig
from anymixer.training.launch import LaunchPlan, initialize_distributed, plan_launch

VOCAB, LENGTH, IGNORED = 61, 12, -100


def config(**changes: Any) -> TrainerConfig:
    """A configuration of six steps on the CPU."""
    defaults: dict[str, Any] = {
        "run_name": "tiny",
        "max_duration": "6ba",
        "global_train_batch_size": 8,
        "eval_interval": "0",
        "device": "cpu",
        "progress_bar": False,
        "optimizer": OptimizerConfig(lr=3e-3),
        "scheduler": SchedulerConfig(t_warmup="2ba", alpha_f=0.1),
    }
    made = TrainerConfig(**(defaults | changes))
    made.validate()
    return made


def model(dropout: float = 0.1, seed: int = 0) -> BertForMaskedLM:
    """A BERT of two layers, the same on every rank."""
    torch.manual_seed(seed)
    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=LENGTH,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
    )


def sample(index: int) -> dict[str, np.ndarray]:
    """One sequence with 1 to 6 masked tokens, a function of its number alone."""
    rng = np.random.default_rng(index)
    ids = rng.integers(5, VOCAB, LENGTH)
    labels = np.full(LENGTH, IGNORED)
    masked = rng.permutation(LENGTH)[: rng.integers(1, 7)]
    labels[masked] = ids[masked]
    ids[masked] = 4
    return {"input_ids": ids, "attention_mask": np.ones(LENGTH, dtype=np.int64), "labels": labels}


class Rows(Dataset):
    """`sample(0)`, `sample(1)`, ..."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return sample(index)


def count_tokens(batch: dict[str, torch.Tensor]) -> dict[str, int]:
    """Real tokens, and those that the loss is taken over."""
    predicted = int((batch["labels"] != IGNORED).sum())
    return {"total": int(batch["attention_mask"].sum()), "loss_generating": max(1, predicted)}


def spec(batch_size: int, rows: int = 40) -> DataSpec:
    """Batches of one rank; over the ranks, step by step, the same rows whatever their number."""
    dataset = Rows(rows)
    sampler = dist.get_sampler(dataset, shuffle=False)
    loader = DataLoader(dataset, batch_size=batch_size, sampler=sampler)
    return DataSpec(loader, get_num_tokens_in_batch=count_tokens)


def write_shards(folder: Path, rows: int = 40) -> str:
    """Write the rows as MDS shards and return the folder, for the option `mds`."""
    from streaming import MDSWriter

    columns = {"input_ids": "ndarray:int64", "attention_mask": "ndarray:int64", "labels": "ndarray:int64"}
    with MDSWriter(out=str(folder), columns=columns) as writer:
        for index in range(rows):
            writer.write(sample(index))
    return str(folder)


def streaming_spec(folder: str, batch_size: int) -> DataSpec:
    """Shuffled rows of MDS shards through a StreamingDataset, which resumes in mid-epoch by itself."""
    from streaming import StreamingDataLoader, StreamingDataset

    from anymixer.data.shared_memory import claim, starting_alone

    leader = dist.get_local_rank() == 0
    with starting_alone(node=0, leader=leader):
        options = {"shuffle": True, "shuffle_seed": 5, "num_canonical_nodes": 1}
        dataset = StreamingDataset(local=folder, batch_size=batch_size, **options)
        if leader:
            claim(dataset._shm_prefix_int)  # so that the next run removes what this one leaves when it is killed
    return DataSpec(StreamingDataLoader(dataset, batch_size=batch_size), get_num_tokens_in_batch=count_tokens)


class Losses(Callback):
    """Collect the loss of every step, and write it to a file where one is named."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.values: list[float] = []

    def batch_end(self, state: State, logger: Logger) -> None:
        self.values.append(state.total_loss_dict["loss/train/total"])
        if self.path is not None and dist.get_global_rank() == 0:
            with self.path.open("a") as file:
                file.write(json.dumps({"step": int(state.timestamp.batch), "loss": self.values[-1]}) + "\n")


class Stopped(Exception):
    """Ends a run from within, as a failure between two checkpoints does."""


class StopAfter(Callback):
    """Raise at the end of a step, before its checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def batch_end(self, state: State, logger: Logger) -> None:
        if int(state.timestamp.batch) == self.step:
            raise Stopped


class KillAfter(Callback):
    """Die as by `kill -9` at the end of a step, before its checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def batch_end(self, state: State, logger: Logger) -> None:
        if int(state.timestamp.batch) == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


class HangInLoader(Callback):
    """Wait for ever for the batch after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def batch_end(self, state: State, logger: Logger) -> None:
        if int(state.timestamp.batch) == self.step:
            dataset = state.dataloader.dataset  # type: ignore[union-attr]
            dataset.__class__.__getitem__ = lambda *_: time.sleep(3600)


class Fail(Callback):
    """Raise at the end of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def batch_end(self, state: State, logger: Logger) -> None:
        if int(state.timestamp.batch) == self.step:
            raise ValueError(f"rank {dist.get_global_rank()} finds a fault")


def kill_while_saving(number: int) -> None:
    """Die as by `kill -9` when half of checkpoint `number` (from 1) is written."""
    from composer.utils import checkpoint

    write, written = checkpoint._write_checkpoint_file, 0

    def write_half(state_dict: dict[str, Any], filename: str) -> None:
        nonlocal written
        written += 1
        write(state_dict, filename)
        if written == number:
            os.truncate(filename, os.path.getsize(filename) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    checkpoint._write_checkpoint_file = write_half


def train(made: TrainerConfig, options: dict[str, Any] | None = None, out: Path | None = None) -> list[float]:
    """Run one configuration and return the loss of every step."""
    from anymixer.training.trainer import build_trainer, fit

    options = options or {}
    plan: LaunchPlan = plan_launch(made)
    initialize_distributed(plan, made)
    losses = Losses(out)
    callbacks: list[Callback] = [losses]
    if "stop_after" in options:
        callbacks.append(StopAfter(options["stop_after"]))
    if "kill_after" in options:
        callbacks.append(KillAfter(options["kill_after"]))
    for name, make in {"hang": HangInLoader, "fail": Fail}.items():
        if name in options and options[name]["rank"] == dist.get_global_rank():
            callbacks.append(make(options[name]["step"]))
    if "kill_while_saving" in options:
        kill_while_saving(options["kill_while_saving"])
    batch = plan.device_train_batch_size
    data = streaming_spec(options["mds"], batch) if "mds" in options else spec(batch)
    trainer = build_trainer(
        made,
        model(dropout=options.get("dropout", 0.1)),
        None,
        data,
        spec(plan.device_eval_batch_size) if options.get("evaluate") else None,
        extra_callbacks=callbacks,
        hparams={"seed": made.seed, "optimizer": {"lr": made.optimizer.lr}},
    )
    with contextlib.suppress(Stopped):
        fit(trainer)
    trainer.close()
    return losses.values


def main(runs: list[dict[str, Any]]) -> None:
    """Do the runs one after the other; each is {"config": {}, "options": {}, "out": FILE}."""
    torch.set_num_threads(1)
    for run in runs:
        changes = dict(run.get("config", {}))
        if "optimizer" in changes:
            changes["optimizer"] = OptimizerConfig(**changes["optimizer"])
        train(config(**changes), run.get("options"), Path(run["out"]))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
