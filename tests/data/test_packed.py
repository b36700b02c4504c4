"""Rows of several sequences: what the loader makes of them, and that nothing leaks from one to the next."""

import shutil

import numpy as np
import pytest
import torch

from anymixer.data import DatasetConfig, LoaderConfig, StreamConfig, build_loader, check_data
from anymixer.data.loader import count_tokens
from anymixer.data.rows import RowReader
from anymixer.errors import UserError

pytest.importorskip("composer")
LENGTH = 32


def loader(tokenizer, local, *, train=False, workers=0, **dataset):
    settings = DatasetConfig(**{"local": local and str(local), "max_seq_len": LENGTH, **dataset})
    config = LoaderConfig(num_workers=workers, dataset=settings)
    return build_loader(config, tokenizer, device_batch_size=8, seed=17, train=train).dataloader


def originals(batch):
    return torch.where(batch["labels"] == -100, batch["input_ids"], batch["labels"])


def sequences(batch):
    """The sequences of a batch, as lists of ids, by their numbers alone."""
    for ids, numbers in zip(originals(batch).tolist(), batch["sequence_id"].tolist()):
        for number in range(max(numbers) + 1):
            yield [id for id, own in zip(ids, numbers) if own == number]


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_reads_every_sequence_whole_and_once(packed_data, tokenizer, writers, workers):
    found = [sequence for batch in loader(tokenizer, packed_data, workers=workers) for sequence in sequences(batch)]
    stored = writers["packed"](tokenizer, range(320, 400))
    expected = [part.tolist() for row in stored for part in np.split(row["tokens"], np.cumsum(row["lengths"])[:-1])]
    assert found == expected
    assert all(sequence[0] == 2 and sequence[-1] == 3 for sequence in found)


def test_padding_is_what_no_sequence_holds(packed_data, tokenizer):
    batches = list(loader(tokenizer, packed_data))
    padding = torch.cat([batch["sequence_id"] for batch in batches]) == -1
    assert padding.any() and not padding.all(dim=1).any()
    for name, value in {"attention_mask": 0, "input_ids": tokenizer.pad_token_id, "labels": -100}.items():
        assert (torch.cat([batch[name] for batch in batches])[padding] == value).all()
    assert torch.cat([batch["attention_mask"] for batch in batches])[~padding].all()


def test_causal_batches_come_from_the_same_shards(packed_data, tokenizer):
    """transformers' convention: labels are the ids and the model shifts them."""
    masked, causal = (list(loader(tokenizer, packed_data, masking=name)) for name in ("bert", "causal_lm"))
    for theirs, ours in zip(masked, causal, strict=True):
        ids, numbers = ours["input_ids"], ours["sequence_id"]
        assert torch.equal(ids, originals(theirs)) and torch.equal(numbers, theirs["sequence_id"])
        first = torch.cat([torch.ones(len(ids), 1, dtype=torch.bool), numbers[:, 1:] != numbers[:, :-1]], dim=1)
        predicted = (numbers >= 0) & ~first
        assert torch.equal(ours["labels"], torch.where(predicted, ids, -100))


def test_causal_text_needs_no_mask_or_pad_token(text_data):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<eos>": 0, "the": 1, "cat": 2}, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    bare = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    batch = next(iter(loader(bare, text_data, masking="causal_lm", max_seq_len=128)))
    real = batch["attention_mask"].bool()
    assert (batch["labels"][~real] == -100).all() and (batch["labels"][:, 0] == -100).all()
    with pytest.raises(UserError, match="tokenizer has no mask_token"):
        loader(bare, text_data)


def test_a_document_a_row_needs_no_sequence_numbers(tokenizer, writers, tmp_path):
    columns = {"tokens": "ndarray:uint16", "lengths": "ndarray:uint16:1"}
    rows = [{"tokens": np.full(n, 7, np.uint16), "lengths": np.array([n], np.uint16)} for n in range(3, 30)]
    writers["split"](tmp_path / "val", columns, rows)
    batch = next(iter(loader(tokenizer, tmp_path)))
    assert batch.keys() == {"input_ids", "attention_mask", "labels"}
    assert batch["attention_mask"].sum(dim=1).tolist() == list(range(3, 11))


def test_a_mask_comes_with_padding_alone(tokenizer, writers, tmp_path):
    columns = {"tokens": "ndarray:uint16", "lengths": "ndarray:uint16:1"}
    rows = [
        {"tokens": np.full(n, 7, np.uint16), "lengths": np.array([n], np.uint16)} for n in [32] * 8 + [32] * 7 + [9]
    ]
    writers["split"](tmp_path / "val", columns, rows)
    full, padded = loader(tokenizer, tmp_path)
    assert "attention_mask" not in full and count_tokens(full)["total"] == 8 * 32
    assert count_tokens(padded)["total"] == padded["attention_mask"].sum() == 7 * 32 + 9


def test_text_beside_packed_rows_is_numbered_too(packed_data, text_data, tokenizer):
    streams = {name: StreamConfig(local=str(local)) for name, local in (("p", packed_data), ("t", text_data))}
    batches = list(loader(tokenizer, None, train=True, streams=streams))
    assert all("sequence_id" in batch for batch in batches)
    numbers = torch.cat([batch["sequence_id"] for batch in batches])
    assert (numbers.max(dim=1).values == 0).any() and (numbers.max(dim=1).values > 0).any()


@pytest.mark.parametrize(
    ("tokens", "lengths", "message"),
    [
        (33, [33], "max_seq_len: a row of the data holds 33 tokens, not 32"),
        (9, [4, 4], "data_local: a packed row holds 9 tokens and its lengths say 8"),
        (8, [4, 0, 4], "data_local: a packed row"),
        (31, None, "max_seq_len: a row of the data holds 31 tokens"),
    ],
)
def test_rows_that_cannot_be(tokenizer, tokens, lengths, message):
    sample = {"tokens": np.full(tokens, 7, np.uint16)}
    if lengths:
        sample["lengths"] = np.array(lengths, np.uint16)
    with pytest.raises(UserError, match=message):
        RowReader(tokenizer, LENGTH).read(sample)


def test_rows_packed_to_another_length_are_refused_before_any_work(packed_data, tokenizer):
    settings = DatasetConfig(local=str(packed_data), max_seq_len=64)
    with pytest.raises(UserError, match=r"max_seq_len: .* hold 32 tokens, not 64.*max_seq_len=32 .*--pack_tokens 64"):
        check_data(LoaderConfig(dataset=settings).resolved(train=True), "train_loader", tokenizer)


@pytest.mark.parametrize("mixer", ["attention", "hydra"])
def test_a_model_gives_a_sequence_the_same_logits_in_any_company(packed_data, tokenizer, mixer):
    from anymixer.models import ModelConfig, build_model

    options = {"vocab_size": 304, "hidden_size": 32, "num_hidden_layers": 2, "hidden_dropout_prob": 0.0}
    spec = {"name": "hydra", "d_state": 8, "headdim": 8} if mixer == "hydra" else {"name": mixer, "num_heads": 4}
    torch.manual_seed(0)
    model = build_model(ModelConfig(mixer=spec, model_config=options)).eval().double()
    batch = next(iter(loader(tokenizer, packed_data)))
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "sequence_id")}
    with torch.no_grad():
        together = model(**inputs).logits
        for row in range(2):
            for number in range(int(batch["sequence_id"][row].max()) + 1):
                own = batch["sequence_id"][row] == number
                alone = model(input_ids=batch["input_ids"][row, own][None]).logits[0]
                torch.testing.assert_close(together[row, own], alone, rtol=0, atol=1e-10)


def test_a_damaged_copy_says_what_to_do(packed_data, tokenizer, tmp_path):
    copy = shutil.copytree(packed_data, tmp_path / "copy")
    (copy / "val" / "shard.00001.mds").unlink()
    with pytest.raises(UserError, match=r"shard\.00001\.mds: the shard is missing; copy it again or convert"):
        loader(tokenizer, copy)
