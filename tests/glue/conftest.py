"""GLUE runs whose jobs train nothing; and a tokenizer, GLUE-format data and jobs small enough to train."""

import importlib.util
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet

from anymixer.data.tokenization import wordpiece_tokenizer
from anymixer.glue.config import GlueSettings, TaskConfig, TaskTrainerConfig
from anymixer.glue.graph import Facts
from anymixer.glue.spec import JobSpec
from anymixer.models import ModelConfig

WORDS = ["the", "a", "cat", "dog", "house", "tree", "sees", "likes", "finds", "old"]
WORDS += ["young", "red", "with", "in", "on", "not", "very", "green", "blue", "bird"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
ARCHITECTURE = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "hidden_dropout_prob": 0.0}
FAKE_JOB = Path(__file__).with_name("fake_job.py")


@pytest.fixture(scope="session")
def fake_job():
    """The module of the job that trains nothing."""
    spec = importlib.util.spec_from_file_location("anymixer_fake_job", FAKE_JOB)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def fake_command(child_environment, monkeypatch):
    """Set how the fake job behaves; returns what starts it."""

    def command(**behaviour):
        monkeypatch.setenv("FAKE_JOB", json.dumps(behaviour))
        return [sys.executable, str(FAKE_JOB)]

    return command


@pytest.fixture(scope="session")
def make_settings():
    """Settings of a run of some tasks; `changes` are those of GlueSettings."""

    def make(tasks, **changes):
        def typed(task):
            trainer = {"lr": 3e-5, "weight_decay": 1e-6, "batch_size": 8, "max_duration": "2ep", "eval_interval": "1ep"}
            trainer |= task.get("trainer_kwargs", {})
            return TaskConfig(**{**task, "trainer_kwargs": TaskTrainerConfig(**trainer)})

        settings = GlueSettings(
            base_run_name="test",
            model=ModelConfig(mixer="hydra"),
            starting_checkpoint_load_path="runs/start",
            tasks={name: typed(task) for name, task in tasks.items()},
            **changes,
        )
        settings.validate()
        return settings

    return make


@pytest.fixture(scope="session")
def facts():
    """What a run found: a checkpoint and the data of every task."""
    return Facts(model={"mixer": "hydra"}, starting_point="runs/start", starting_digests={"runs/start": "abc"})


@pytest.fixture(autouse=True)
def one_thread():
    """Make CPU results independent of how many cores are free."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer():
    """BERT's tokenizer with a vocabulary of 25 words."""
    return wordpiece_tokenizer({word: number for number, word in enumerate([*SPECIAL, *WORDS])})


@pytest.fixture(scope="session")
def tokenizer_folder(tokenizer, tmp_path_factory):
    """Where it is saved."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(str(folder))
    return folder


def _sentences(count: int, seed: int, longest: int = 12) -> list[str]:
    """Random words, 3 to `longest` a sentence."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(3, longest + 1))) for _ in range(count)]


def _write_parquet(folder: Path, split: str, columns: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.table(columns), folder / f"{split}.parquet")


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """RTE (entailment: the second text begins with the first one's first word), CoLA (whether `not` is missing) and
    STS-B (random scores), in the Hub's columns."""
    root = tmp_path_factory.mktemp("glue")
    for split, count, seed in (("train", 96, 0), ("validation", 24, 1), ("test", 10, 2)):
        rng = np.random.default_rng(seed + 10)
        first, rest = _sentences(count, seed), _sentences(count, seed + 100, longest=6)
        same = rng.integers(0, 2, count)
        second = [f"{a.split()[0] if s else 'not'} {b}" for a, b, s in zip(first, rest, same)]
        labels = [-1] * count if split == "test" else (1 - same).tolist()
        _write_parquet(root / "rte", split, {"sentence1": first, "sentence2": second, "label": labels})
        labels = [-1] * count if split == "test" else [int("not" not in text) for text in first]
        _write_parquet(root / "cola", split, {"sentence": first, "label": labels})
        scores = [-1.0] * count if split == "test" else rng.uniform(0, 5, count).tolist()
        _write_parquet(root / "stsb", split, {"sentence1": first, "sentence2": second, "label": scores})
    return root


@pytest.fixture
def make_spec(data, tokenizer_folder):
    """Build the specification of a job: a small attention model from scratch; keyword arguments change its fields."""

    def build(**changes: Any) -> JobSpec:
        model = ModelConfig(mixer={"name": "attention", "num_heads": 2}, model_config=dict(ARCHITECTURE))
        defaults = {
            "task": "rte",
            "seed": 3,
            "model": asdict(model),
            "tokenizer_name": str(tokenizer_folder),
            "data_local": str(data),
            "max_sequence_length": 32,
            "batch_size": 16,
            "max_duration": "6ba",
            "eval_interval": "3ba",
            "lr": 1e-3,
            "from_scratch": changes.get("starting_point") is None,
        }
        return JobSpec(**(defaults | changes))

    return build
