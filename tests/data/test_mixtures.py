"""Several streams in one dataset: how much of each an epoch holds."""

from collections import Counter

import numpy as np
import pytest

from anymixer.data import DatasetConfig, LoaderConfig, StreamConfig, build_loader

pytest.importorskip("composer")


@pytest.fixture(scope="module")
def places(writers, tmp_path_factory):
    """Three streams of 400, 200 and 100 rows; the first token of a row says which stream, the second which row."""
    found = {}
    for stream, rows in enumerate((400, 200, 100)):
        found[stream] = folder = tmp_path_factory.mktemp("stream") / str(stream)
        samples = [{"tokens": np.array([10 + stream, 20 + row // 2, *[9] * 6], np.uint16)} for row in range(rows)]
        writers["split"](folder / "train", {"tokens": "ndarray:uint16:8"}, samples, size_limit=2048)
    return found


def drawn(tokenizer, places, batch_size=10, epochs=1, **weights):
    """Stream numbers of the rows of some epochs, in their order."""
    parts = {f"s{n}": StreamConfig(local=str(places[n]), **{k: v[n] for k, v in weights.items()}) for n in places}
    settings = DatasetConfig(max_seq_len=8, streams=parts, masking="causal_lm")
    config = LoaderConfig(num_workers=0, dataset=settings)
    spec = build_loader(config, tokenizer, device_batch_size=batch_size, seed=1, train=True)
    return np.concatenate([b["input_ids"][:, 0].numpy() - 10 for _ in range(epochs) for b in spec.dataloader])


def test_proportions_come_out_in_every_epoch(tokenizer, places):
    found = drawn(tokenizer, places, epochs=2, proportion=(0.2, 0.3, 0.5))
    assert len(found) == 2 * 700
    for epoch in np.split(found, 2):
        assert Counter(epoch.tolist()) == {0: 140, 1: 210, 2: 350}


def test_proportions_come_out_along_the_epoch(tokenizer, places):
    """A part of an epoch is a random draw from the mixture, not one stream after the other."""
    found = drawn(tokenizer, places, proportion=(0.2, 0.3, 0.5))
    for part in np.split(found, 4):
        assert Counter(part.tolist()).keys() == {0, 1, 2}
        assert (part == 2).mean() == pytest.approx(0.5, abs=0.25)


def test_repeats_and_choices(tokenizer, places):
    assert Counter(drawn(tokenizer, places, repeat=(0.5, 1.0, 3.0)).tolist()) == {0: 200, 1: 200, 2: 300}
    assert Counter(drawn(tokenizer, places, choose=(50, 60, 70)).tolist()) == {0: 50, 1: 60, 2: 70}
    assert Counter(drawn(tokenizer, places).tolist()) == {0: 400, 1: 200, 2: 100}
