import shutil
from itertools import islice

import numpy as np
import pytest
import torch

from anymixer.data import DatasetConfig, LoaderConfig, build_loader
from anymixer.data.loader import count_tokens
from anymixer.data.rows import RowReader
from anymixer.errors import UserError

pytest.importorskip("composer")


def loader(tokenizer, local, *, train=True, workers=0, batch_size=8, seed=17, **dataset):
    dataset = {"max_seq_len": 32, **dataset}
    config = LoaderConfig(num_workers=workers, dataset=DatasetConfig(local=local and str(local), **dataset))
    return build_loader(config, tokenizer, device_batch_size=batch_size, seed=seed, train=train).dataloader


def same(left, right) -> bool:
    return len(left) == len(right) and all(
        a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in zip(left, right)
    )


def test_batches_are_complete_dicts_of_int64(token_data, tokenizer):
    batches = list(loader(tokenizer, token_data))
    assert batches and all(batch.keys() == {"input_ids", "labels"} for batch in batches)
    assert all(value.shape == (8, 32) and value.dtype == torch.int64 for batch in batches for value in batch.values())
    assert len(loader(tokenizer, token_data)) == len(batches)


def test_an_epoch_without_a_whole_batch_is_refused(token_data, tokenizer):
    with pytest.raises(UserError, match=r"^global_train_batch_size: 8 is more than the 5 rows of an epoch"):
        loader(tokenizer, token_data, epoch_size=5)
    assert len(loader(tokenizer, token_data, epoch_size=8)) == 1
    assert len(loader(tokenizer, token_data, train=False, batch_size=10**4)) == 1


@pytest.mark.parametrize("train", [True, False])
def test_workers_do_not_change_batches(token_data, tokenizer, train):
    here, away = (loader(tokenizer, token_data, train=train, workers=workers) for workers in (0, 2))
    assert same([*here, *here], [*away, *away])


def test_training_masks_change_with_the_epoch_and_evaluation_masks_do_not(token_data, tokenizer):
    train = loader(tokenizer, token_data, train=True, shuffle=False)
    assert not same(list(train), list(train))
    evaluation = loader(tokenizer, token_data, train=False)
    assert same(list(evaluation), list(evaluation))
    other_seed = loader(tokenizer, token_data, train=False, seed=18)
    assert not same(list(evaluation), list(other_seed))


def test_evaluation_reads_every_sample_once(token_data, tokenizer):
    evaluation = loader(tokenizer, token_data, train=False)
    originals = torch.cat([torch.where(b["labels"] == -100, b["input_ids"], b["labels"]) for b in evaluation])
    stored = [evaluation.dataset.shards[0][number]["tokens"] for number in range(len(evaluation.dataset))]
    assert (originals.numpy() == np.stack(stored)).all()


def test_text_is_tokenized_cut_and_padded(text_data, tokenizer):
    dataset = loader(tokenizer, text_data, train=False, max_seq_len=48).dataset
    for number in range(20):
        row = dataset[number]
        original = np.where(row["labels"] == -100, row["input_ids"], row["labels"])
        text = dataset.shards[0][number]["text"]
        expected = tokenizer(text, truncation=True, max_length=48, padding="max_length")
        assert original.tolist() == expected["input_ids"]
        assert row["attention_mask"].tolist() == expected["attention_mask"]
        assert (row["labels"][row["attention_mask"] == 0] == -100).all()


def test_a_long_text_is_read_only_as_far_as_needed(tokenizer):
    reader = RowReader(tokenizer, 32)
    for text in (
        "the cat sat on a mat " * 500,
        "t h e " * 500 + "x" * 9000,
        "x" * 5000,
        " " * 5000 + "the cat",
    ):
        assert reader.tokenize(text) == tokenizer(text, truncation=True, max_length=32)["input_ids"]


def test_sequence_ids_count_the_documents_of_a_row(token_data, tokenizer):
    plain, numbered = (next(iter(loader(tokenizer, token_data, train=False, eos_token_id=eos))) for eos in (None, 3))
    assert same([plain], [{name: value for name, value in numbered.items() if name != "sequence_id"}])
    original = torch.where(numbered["labels"] == -100, numbered["input_ids"], numbered["labels"])
    ends = (original == 3).cumsum(dim=1)
    assert torch.equal(numbered["sequence_id"][:, 1:], ends[:, :-1]) and not numbered["sequence_id"][:, 0].any()


def test_tokens_are_counted_for_composer():
    labels = torch.tensor([[-100, 5, 6], [-100, -100, 7]])
    batch = {"attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]), "labels": labels}
    assert count_tokens(batch) == {"total": 5, "loss_generating": 3}
    assert count_tokens({**batch, "labels": torch.full_like(labels, -100)})["loss_generating"] == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_in_an_epoch_continues_it(token_data, tokenizer, workers):
    whole = loader(tokenizer, token_data)
    expected = [*whole, *whole]
    stopped = loader(tokenizer, token_data, workers=workers)
    seen = list(islice(stopped, 3))
    state = stopped.dataset.state_dict(3 * 8, True)
    resumed = loader(tokenizer, token_data, workers=workers)
    resumed.load_state_dict(state)
    assert same([*seen, *resumed, *resumed], expected)


def test_resuming_between_epochs_begins_the_next(token_data, tokenizer):
    whole = loader(tokenizer, token_data)
    expected = [*whole, *whole, *whole]
    stopped = loader(tokenizer, token_data)
    seen = list(stopped)
    # Composer counts samples from the beginning of an epoch it has already stepped into.
    resumed = loader(tokenizer, token_data)
    resumed.load_state_dict(stopped.dataset.state_dict(0, True))
    assert same([*seen, *resumed, *resumed], expected)


def test_resuming_after_the_last_batch_of_an_epoch_begins_the_next(token_data, tokenizer):
    whole = loader(tokenizer, token_data)
    first, second = list(whole), list(whole)
    resumed = loader(tokenizer, token_data)
    resumed.load_state_dict({**whole.dataset.state_dict(len(first) * 8, True), "epoch": 0})
    assert list(resumed) == []
    assert same(list(resumed), second)


def test_leaving_an_epoch_early_begins_the_next(token_data, tokenizer):
    for workers in (0, 2):
        left = loader(tokenizer, token_data, workers=workers)
        list(islice(left, 2))
        assert left.dataset.between_epochs
        whole = loader(tokenizer, token_data)
        list(whole)
        assert same(list(left), list(whole))


@pytest.fixture
def copy(token_data, tmp_path):
    return shutil.copytree(token_data, tmp_path / "copy")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_flipped_byte_is_one_line(copy, tokenizer, workers):
    shard = copy / "train" / "shard.00000.mds"
    data = bytearray(shard.read_bytes())
    data[-6] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError) as caught:
        list(loader(tokenizer, copy, workers=workers))
    assert str(caught.value).startswith(f"{shard}: the shard is damaged") and "\n" not in str(caught.value)
    assert list(loader(tokenizer, copy, workers=0, validate_hash=None))


def test_ids_beyond_the_vocabulary(copy, tokenizer, tmp_path):
    from anymixer.data import load_tokenizer

    words = [word for word, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    (tmp_path / "vocab.txt").write_text("\n".join(words[:-100]))
    (copy / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"tokenizer_name: the data holds id \d+"):
        list(loader(load_tokenizer(str(tmp_path)), copy))


def test_streamings_own_complaints_are_user_errors(token_data, tokenizer, tmp_path):
    with pytest.raises(UserError, match=r"train_loader\.dataset: .*[Cc]ache"):
        loader(tokenizer, token_data, cache_limit=10)
