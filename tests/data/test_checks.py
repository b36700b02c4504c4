import json
import shutil

import pytest

from anymixer.data import DatasetConfig, LoaderConfig, StreamConfig, check_batch_size, check_data, load_tokenizer
from anymixer.errors import UserError


def config(local, **dataset) -> LoaderConfig:
    local = str(local) if local is not None else None
    return LoaderConfig(dataset=DatasetConfig(local=local, max_seq_len=32, **dataset)).resolved(train=True)


def refused(local, tokenizer=None, **dataset) -> str:
    with pytest.raises(UserError) as caught:
        check_data(config(local, **dataset), "train_loader", tokenizer)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def copy(token_data, tmp_path):
    """A copy of the token rows that a test may damage."""
    return shutil.copytree(token_data, tmp_path / "copy")


def test_good_data_passes(token_data, text_data, tokenizer):
    check_data(config(token_data), "train_loader", tokenizer)
    check_data(config(text_data), "train_loader", tokenizer)


def test_missing_folder_names_key_and_command(tmp_path):
    message = refused(tmp_path / "absent")
    for part in (str(tmp_path / "absent"), "data_local", "python -m data_prep.convert", "--dataset demo"):
        assert part in message


def test_the_command_that_makes_missing_data_can_be_copied(tmp_path):
    with pytest.raises(UserError) as caught:
        check_data(config(tmp_path / "my data"), "train_loader", rows="--tokenizer t --pack_tokens 32")
    command = f"--dataset text --input FILES... --out_root '{tmp_path / 'my data'}' --tokenizer t --pack_tokens 32 ("
    assert command in str(caught.value)
    assert f"data_prep.convert --dataset c4 --out_root {tmp_path / 'c4'} " in refused(tmp_path / "c4")
    assert f"data_prep.convert --dataset demo --out_root {tmp_path / 'demo'} " in refused(tmp_path / "demo")


def test_an_epoch_must_fill_a_global_batch(token_data, packed_data):
    def check(size, **dataset):
        check_batch_size(config(token_data, **dataset), size, "global_train_batch_size")

    rows = sum(shard["samples"] for shard in json.loads((token_data / "train" / "index.json").read_text())["shards"])
    check(rows)
    message = rf"^global_train_batch_size: {rows + 1} is more than the {rows} rows .*use at most {rows}$"
    with pytest.raises(UserError, match=message):
        check(rows + 1)
    both = {"a": StreamConfig(local=str(token_data)), "b": StreamConfig(local=str(packed_data))}
    check(rows + 1, streams=both)
    both["a"].repeat = 2
    check(10**6, streams=both)  # streaming will tell
    check(10**6, epoch_size=2**20)
    check_batch_size(LoaderConfig(dataset=DatasetConfig(local=str(token_data))).resolved(train=False), 10**6, "size")


def test_unset_folder(tmp_path):
    assert "train_loader.dataset.local: not set; set data_local" in refused(None)
    assert "downloaded shards" in refused(None, remote="s3://bucket/data")


def test_folder_without_index(copy):
    (copy / "train" / "index.json").unlink()
    assert "no index.json" in refused(copy)


def test_unreadable_index(copy):
    (copy / "train" / "index.json").write_text('{"shards": [')
    assert "cannot be read as an index" in refused(copy)


def test_empty_split(copy):
    (copy / "train" / "index.json").write_text(json.dumps({"version": 2, "shards": []}))
    assert "empty" in refused(copy)


@pytest.mark.parametrize(("keep", "word"), [(0, "empty"), (100, "truncated")])
def test_cut_shard(copy, keep, word):
    shard = copy / "train" / "shard.00000.mds"
    shard.write_bytes(shard.read_bytes()[:keep])
    message = refused(copy)
    assert str(shard) in message and word in message


def test_missing_shard_matters_without_a_remote(copy, token_data):
    (copy / "train" / "shard.00000.mds").unlink()
    assert "shard is missing" in refused(copy)
    check_data(config(copy, remote=str(token_data)), "train_loader")


def test_rows_of_another_length(token_data):
    settings = config(token_data)
    settings.dataset.max_seq_len = 64
    with pytest.raises(UserError, match=r"max_seq_len: .* hold 32 tokens, not 64.*--concat_tokens 64"):
        check_data(settings, "train_loader")


def test_another_tokenizer(token_data, tokenizer, tmp_path):
    words = [word for word, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])]
    (tmp_path / "vocab.txt").write_text("\n".join([*words[:-2], words[-1], words[-2]]))
    message = refused(token_data, load_tokenizer(str(tmp_path)))
    assert "another tokenizer" in message and f"{token_data}/tokenizer" in message


def test_hash_that_was_not_recorded(token_data):
    assert "no 'sha1' hash (recorded: xxh64)" in refused(token_data, validate_hash="sha1")


def test_streams_may_not_share_a_folder(token_data):
    assert "2 streams share" in refused(token_data, streams={"a": StreamConfig(), "b": StreamConfig()})
