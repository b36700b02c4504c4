"""Evaluation: sorted by length, on several ranks, and stream by stream."""

import json

import pytest
import torch

from anymixer.data import DatasetConfig, LoaderConfig, StreamConfig, build_eval_loaders, build_loader
from anymixer.data.text_loader import by_length
from anymixer.errors import UserError

pytest.importorskip("composer")


def loader(tokenizer, local, *, bucket=0, workers=0, max_seq_len=128, train=False):
    dataset = DatasetConfig(local=str(local), max_seq_len=max_seq_len)
    config = LoaderConfig(num_workers=workers, bucket_batches=bucket, dataset=dataset)
    return build_loader(config, tokenizer, device_batch_size=8, seed=17, train=train).dataloader


def rows(batches):
    """Every row without its padding."""
    found = []
    for batch in batches:
        for row in range(len(batch["labels"])):
            real = batch["attention_mask"][row].bool() if "attention_mask" in batch else slice(None)
            found.append(b"".join(batch[name][row][real].numpy().tobytes() for name in ("input_ids", "labels")))
    return sorted(found)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("window", [1, 3, 100])
def test_sorting_by_length_moves_rows_and_shortens_batches(text_data, tokenizer, window, workers):
    plain, sorted_ = (list(loader(tokenizer, text_data, bucket=size, workers=workers)) for size in (0, window))
    assert rows(plain) == rows(sorted_)
    assert [len(batch["labels"]) for batch in plain] == [len(batch["labels"]) for batch in sorted_]
    positions = [sum(batch["labels"].numel() for batch in batches) for batches in (plain, sorted_)]
    assert positions[1] < 0.8 * positions[0]
    assert all(batch["labels"].shape[1] % 8 == 0 for batch in sorted_)


def test_the_loss_of_sorted_rows_is_that_of_the_rows(text_data, tokenizer):
    from anymixer.models import ModelConfig, build_model

    options = {"vocab_size": 304, "hidden_size": 32, "num_hidden_layers": 2, "hidden_dropout_prob": 0.0}
    torch.manual_seed(0)
    mixer = {"name": "hydra", "d_state": 8, "headdim": 8}
    model = build_model(ModelConfig(mixer=mixer, model_config=options)).eval()
    totals = []
    for window in (0, 5):
        total = count = 0
        for batch in loader(tokenizer, text_data, bucket=window):
            predicted = int((batch["labels"] != -100).sum())
            with torch.no_grad():
                total += float(model(**batch).loss) * predicted
            count += predicted
        totals.append((count, total / count))
    assert totals[0][0] == totals[1][0] and totals[0][1] == pytest.approx(totals[1][1], abs=1e-5)


def test_training_is_never_sorted(text_data, tokenizer):
    with pytest.raises(UserError, match=r"train_loader\.bucket_batches: .* it is for evaluation"):
        loader(tokenizer, text_data, bucket=2, train=True)


def test_a_batch_is_as_long_as_its_longest_row_in_steps_of_eight():
    batch = {
        "input_ids": torch.arange(32).reshape(2, 16),
        "attention_mask": (torch.arange(16) < torch.tensor([[9], [3]])).long(),
        "labels": torch.full((2, 16), -100),
    }
    (sorted_,) = by_length([batch], 4)
    assert sorted_["input_ids"][:, 0].tolist() == [16, 0] and sorted_["labels"].shape == (2, 16)
    (short,) = by_length([{name: values[1:] for name, values in batch.items()}], 4)
    assert short["input_ids"].tolist() == [list(range(16, 24))]


def two_streams(packed_data, text_data, **changes):
    streams = {
        "packed": StreamConfig(local=str(packed_data)),
        "text": StreamConfig(local=str(text_data), choose=40),
    }
    return LoaderConfig(num_workers=0, dataset=DatasetConfig(max_seq_len=32, streams=streams, **changes))


def test_every_stream_is_evaluated_by_itself(packed_data, text_data, tokenizer):
    config = two_streams(packed_data, text_data)
    loaders = build_eval_loaders(config, tokenizer, device_batch_size=8, seed=17)
    assert list(loaders) == ["packed", "text"]
    alone = loader(tokenizer, packed_data, max_seq_len=32)
    assert rows(loaders["packed"].dataloader) == rows(alone)
    assert sum(len(batch["labels"]) for batch in loaders["text"].dataloader) == 40
    assert list(build_eval_loaders(one(packed_data), tokenizer, device_batch_size=8, seed=1)) == ["eval"]


def one(local):
    return LoaderConfig(num_workers=0, dataset=DatasetConfig(local=str(local), max_seq_len=32))


def test_a_proportion_means_nothing_to_an_evaluation(packed_data, text_data, tokenizer):
    config = two_streams(packed_data, text_data)
    config.dataset.streams = {n: StreamConfig(local=s.local, proportion=0.5) for n, s in config.dataset.streams.items()}
    with pytest.raises(UserError, match=r"eval_loader\.dataset\.streams\.packed\.proportion: every stream"):
        build_eval_loaders(config, tokenizer, device_batch_size=8, seed=17)


def test_a_run_reports_the_metrics_of_each_stream(packed_data, text_data, tokenizer, tmp_path):
    """Through the program: `metrics/STREAM/...` in the logs, and each stream in the summary."""
    from anymixer.config import load_config
    from anymixer.pretrain import pretrain

    file = tmp_path / "run.yaml"
    streams = f"{{packed: {{local: {packed_data}}}, text: {{local: {text_data}}}}}"
    file.write_text(
        f"tokenizer_name: {packed_data}/tokenizer\n"
        "max_seq_len: 32\nmasking: span\nmax_duration: 2ba\nglobal_train_batch_size: 8\neval_interval: 2ba\n"
        "device: cpu\nprogress_bar: false\neval_subset_num_batches: 2\n"
        f"save_folder: {tmp_path}/run\nscheduler: {{t_warmup: 1ba}}\n"
        "model: {mixer: {name: attention, num_heads: 2}, model_config: {vocab_size: 304, hidden_size: 16, "
        "num_hidden_layers: 1, hidden_dropout_prob: 0.0}}\n"
        f"train_loader: {{num_workers: 0, dataset: {{streams: {streams}}}}}\n"
        f"eval_loader: {{num_workers: 0, bucket_batches: 4, dataset: {{streams: {streams}}}}}\n"
        f"loggers: {{tensorboard: {{log_dir: {tmp_path}/tb}}}}\n"
    )
    config = load_config(file)
    assert (config.train_loader.dataset.masking, config.eval_loader.dataset.masking) == ("span", "bert")
    pretrain(config)
    after = json.loads((tmp_path / "run" / "summary.json").read_text())["after"]
    assert after["streams"].keys() == {"packed", "text"}
    losses = [after["streams"][name]["loss"] for name in ("packed", "text")]
    assert losses[0] != losses[1] and after["loss"] == pytest.approx(sum(losses) / 2)
    events = b"".join(path.read_bytes() for path in (tmp_path / "tb").rglob("events*"))
    assert b"metrics/packed/LanguageCrossEntropy" in events and b"metrics/text/MaskedAccuracy" in events
