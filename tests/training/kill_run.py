"""Trains a tiny run again and again in forks of this process, each killed at a random moment.

    python tests/training/kill_run.py '{"data": FOLDER, "folder": FOLDER, "kills": 10}'

Forks, because importing takes seconds and a run takes one. Every process appends {"step", "loss"} lines to
`FOLDER/losses-N.jsonl`; 0 is a run of its own that nobody kills, the last one the run that got to the end.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import composer
import torch
import transformers
from composer.core import Callback, State
from composer.loggers import Logger

from anymixer.data import DatasetConfig, LoaderConfig, build_loader, load_tokenizer
from anymixer.models import ModelConfig, build_model
from anymixer.training import SchedulerConfig, TrainerConfig
from anymixer.training.launch import initialize_distributed, plan_launch
from anymixer.training.trainer import build_trainer, fit

STEPS = 30


class Losses(Callback):
    """Append the loss of every step to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def batch_end(self, state: State, logger: Logger) -> None:
        """Write one line, unbuffered."""
        line = {"step": int(state.timestamp.batch), "loss": state.total_loss_dict["loss/train/total"]}
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def train(data: str, saves: Path, losses: Path) -> None:
    """Train on packed rows with two workers, a checkpoint every other step, from the newest there is."""
    config = TrainerConfig(
        run_name="killed",
        max_duration=f"{STEPS}ba",
        global_train_batch_size=8,
        eval_interval="0",
        device="cpu",
        progress_bar=False,
        scheduler=SchedulerConfig(t_warmup="2ba"),
        save_folder=str(saves),
        save_interval="2ba",
        save_num_checkpoints_to_keep=3,
        autoresume=True,
    )
    initialize_distributed(plan_launch(config), config)
    tokenizer = load_tokenizer(f"{data}/tokenizer")
    torch.manual_seed(0)
    options = {"vocab_size": 304, "hidden_size": 16, "num_hidden_layers": 1, "hidden_dropout_prob": 0.1}
    model = build_model(ModelConfig(mixer={"name": "attention", "num_heads": 2}, model_config=options))
    dataset = DatasetConfig(local=data, max_seq_len=32, masking="span")
    loader = LoaderConfig(num_workers=2, dataset=dataset)
    spec = build_loader(loader, tokenizer, device_batch_size=8, seed=17, train=True)
    trainer = build_trainer(config, model, tokenizer, spec, extra_callbacks=[Losses(losses)])
    fit(trainer)
    trainer.close()


def in_fork(kill_after: float | None, *arguments: Any) -> tuple[int, float]:
    """Train in a fork; return its wait status and how long it ran."""
    begin = time.monotonic()
    child = os.fork()
    if child == 0:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        try:
            train(*arguments)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return status, time.monotonic() - begin


def main(job: dict[str, Any]) -> None:
    """Do one whole run, then the killed one to its end; print how many times it was killed."""
    torch.set_num_threads(1)
    folder = Path(job["folder"])
    status, seconds = in_fork(None, job["data"], folder / "whole", folder / "losses-0.jsonl")
    assert status == 0
    draw, killed, attempt = random.Random(job.get("seed", 0)), 0, 0
    while True:
        attempt += 1
        moment = draw.uniform(0.3, 0.9) * seconds if killed < job["kills"] else None
        status, _ = in_fork(moment, job["data"], folder / "killed", folder / f"losses-{attempt}.jsonl")
        if moment is None:
            assert status == 0
            break
        killed += status == signal.SIGKILL
    print(
        json.dumps({"killed": killed, "seconds": seconds, "versions": [composer.__version__, transformers.__version__]})
    )


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
