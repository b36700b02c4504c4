"""Trains a tiny run again and again in forks of this process, each killed at a random moment.

    python tests/training/kill_run.py '{"data": FOLDER, "folder": FOLDER, "kills": 10}'

Forks, because importing takes seconds and a run takes one. Every process appends {"step", "loss", "seconds"} lines to
`FOLDER/losses-N.jsonl`; 0 is a run of its own that nobody kills, the last one the run that got to the end.

A process kills itself, after a drawn number of steps and a drawn part of the next ones: killed by the clock of another
process, it would die in its imports on a busy machine, every time. At the latest it does so before its last checkpoint,
however late its own clock is.
"""

import itertools
import json
import os
import random
import signal
import statistics
import sys
import threading
import time
from dataclasses import dataclass
from multiprocessing import resource_tracker
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

STEPS = 40


@dataclass(frozen=True)
class Kill:
    """SIGKILL `seconds` after the process has done `steps` steps; 0 steps: after it began."""

    steps: int
    seconds: float

    def arm(self) -> None:
        """Let a thread do it: at any moment of a step, an evaluation or the writing of a checkpoint."""
        threading.Timer(self.seconds, os.kill, (os.getpid(), signal.SIGKILL)).start()


class Losses(Callback):
    """Append the loss of every step to a file, and die when it is time."""

    def __init__(self, path: Path, kill: Kill | None) -> None:
        self.path, self.kill, self.steps = path, kill, 0
        self.begin = time.monotonic()
        if kill and kill.steps == 0:
            kill.arm()

    def batch_end(self, state: State, logger: Logger) -> None:
        """Write one line, unbuffered."""
        line = {"step": int(state.timestamp.batch), "loss": state.total_loss_dict["loss/train/total"]}
        with self.path.open("a") as file:
            file.write(json.dumps(line | {"seconds": time.monotonic() - self.begin}) + "\n")
        self.steps += 1
        if self.kill and self.kill.steps == self.steps:
            self.kill.arm()
        if self.kill and state.timestamp.batch == STEPS:
            os.kill(os.getpid(), signal.SIGKILL)


def train(data: str, saves: Path, losses: Losses) -> None:
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
    trainer = build_trainer(config, model, tokenizer, spec, extra_callbacks=[losses])
    fit(trainer)
    trainer.close()


def in_fork(data: str, saves: Path, losses: Path, kill: Kill | None = None) -> int:
    """Train in a fork; return its wait status."""
    child = os.fork()
    if child == 0:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        try:
            train(data, saves, Losses(losses, kill))
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def main(job: dict[str, Any]) -> None:
    """Do one whole run, then the killed one to its end; print how many times it was killed."""
    torch.set_num_threads(1)
    # For all forks: one of a killed fork's own removes its segments at some later moment, and by then the next fork may
    # have those of that number.
    resource_tracker.ensure_running()
    folder, data = Path(job["folder"]), job["data"]
    assert in_fork(data, folder / "whole", folder / "losses-0.jsonl") == 0
    seconds = [json.loads(line)["seconds"] for line in (folder / "losses-0.jsonl").open()]
    step = statistics.median(after - before for before, after in itertools.pairwise(seconds))
    draw = random.Random(job.get("seed", 0))
    for attempt in range(1, job["kills"] + 1):
        steps = draw.randint(0, 3)
        kill = Kill(steps, draw.uniform(0, 2 * step if steps else seconds[0]))
        status = in_fork(data, folder / "killed", folder / f"losses-{attempt}.jsonl", kill)
        assert status == signal.SIGKILL, f"attempt {attempt}, {kill}: {status}"
    assert in_fork(data, folder / "killed", folder / f"losses-{job['kills'] + 1}.jsonl") == 0
    print(json.dumps({"step": step, "versions": [composer.__version__, transformers.__version__]}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
