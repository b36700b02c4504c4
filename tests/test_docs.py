"""What the documents show runs as printed."""

import re
from pathlib import Path

import torch

from anymixer.layers.packing import make_packing
from anymixer.mixers import build_mixer, mixers

ROOT = Path(__file__).parents[1]


def python_blocks(name):
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), flags=re.DOTALL)


def test_the_readme_s_example_runs():
    (block,) = python_blocks("README.md")
    names = {}
    exec(block, names)
    assert names["y"].shape == (2, 128, 256)


def test_the_example_of_language_models_runs():
    (block,) = python_blocks("docs/causal.md")
    names = {}
    exec(block, names)
    assert names["ids"].shape[1] <= 20 and names["z"].shape == names["y"].shape == (2, 16, 64)


def test_the_example_of_a_new_mixer_works_and_keeps_sequences_apart():
    (block,) = python_blocks("docs/adding_a_mixer.md")
    try:
        exec(block, {"__name__": "example"})
        mixer = build_mixer({"name": "mean", "bias": False}, 8)
    finally:
        mixers._classes.pop("mean", None)
    hidden = torch.randn(1, 7, 8)
    packing = make_packing(None, torch.tensor([[0, 0, 0, 1, 1, -1, -1]]))
    together = mixer(hidden, packing)
    torch.testing.assert_close(together[:, :3], mixer(hidden[:, :3]))
    torch.testing.assert_close(together[:, 3:5], mixer(hidden[:, 3:5]))
