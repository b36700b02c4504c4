"""A run that is killed at ten random moments gives the losses of one that nobody kills, to the last bit."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        sys.platform != "linux" or torch.cuda.is_available(), reason="forks, which CUDA does not survive"
    ),
]

SCRIPT = Path(__file__).with_name("kill_run.py")
KILLS = 10


def write_packed_rows(folder: Path) -> None:
    """Rows of random ids, and a tokenizer for them."""
    from streaming import MDSWriter

    from anymixer.data import wordpiece_tokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{n}" if n % 3 else f"##w{n}" for n in range(5, 300))]
    wordpiece_tokenizer({word: n for n, word in enumerate(words)}).save_pretrained(str(folder / "tokenizer"))
    rng = np.random.default_rng(0)
    columns = {"tokens": "ndarray:uint16", "lengths": "ndarray:uint16"}
    with MDSWriter(out=str(folder / "train"), columns=columns, hashes=["xxh64"], size_limit=4096) as writer:
        for _ in range(120):
            lengths = rng.integers(5, 11, 3).astype(np.uint16)
            parts = [[2, *rng.integers(5, 300, n - 2), 3] for n in lengths]
            writer.write({"tokens": np.concatenate(parts).astype(np.uint16), "lengths": lengths})


def losses(path: Path) -> dict[int, float]:
    """The whole lines of a file; the last may be cut."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return {line["step"]: line["loss"] for line in map(json.loads, (line for line in lines if line.endswith("\n")))}


def test_killed_at_ten_random_moments_the_losses_are_the_same(tmp_path):
    write_packed_rows(tmp_path / "data")
    seed = random.randrange(2**32)
    job = {"data": str(tmp_path / "data"), "folder": str(tmp_path), "kills": KILLS, "seed": seed}
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    command = [sys.executable, str(SCRIPT), json.dumps(job)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, f"seed {seed}: {done.stderr}"
    whole = losses(tmp_path / "losses-0.jsonl")
    assert list(whole) == list(range(1, 41))
    assert list(losses(tmp_path / f"losses-{KILLS + 1}.jsonl"))[-1] == 40
    for part in map(losses, tmp_path.glob("losses-*.jsonl")):
        assert part == {step: whole[step] for step in part}, f"seed {seed}"
