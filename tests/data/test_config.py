from dataclasses import fields

import pytest

from anymixer.data import DatasetConfig, LoaderConfig, StreamConfig
from anymixer.data.config import PARTITION_ALGOS, SHUFFLE_ALGOS
from anymixer.errors import UserError


def test_omegaconf_reads_the_schema():
    from omegaconf import OmegaConf

    given = {"dataset": {"epoch_size": "10k", "streams": {"wiki": {"local": "x", "proportion": 0.5}}}}
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(LoaderConfig), given))
    assert isinstance(config, LoaderConfig)
    assert config.dataset.streams == {"wiki": StreamConfig(local="x", proportion=0.5)}


def test_renamed_keys_are_not_fields():
    for config in (DatasetConfig, StreamConfig):
        assert config.RENAMED and not set(config.RENAMED) & {field.name for field in fields(config)}


def test_names_are_those_of_the_installed_streaming():
    from streaming.base import partition, shuffle

    assert set(SHUFFLE_ALGOS) == set(shuffle.algos)
    assert set(PARTITION_ALGOS) == set(partition.algos)


def test_stream_fields_are_streamings():
    import inspect

    from streaming import Stream

    assert {field.name for field in fields(StreamConfig)} == set(inspect.signature(Stream).parameters)


def test_roles_fill_what_is_unset():
    train, evaluate = LoaderConfig().resolved(train=True), LoaderConfig().resolved(train=False)
    assert (train.drop_last, train.dataset.split, train.dataset.shuffle) == (True, "train", True)
    assert (evaluate.drop_last, evaluate.dataset.split, evaluate.dataset.shuffle) == (False, "val", False)
    assert (train.dataset.mlm_probability, evaluate.dataset.mlm_probability) == (0.30, 0.15)
    given = LoaderConfig(drop_last=False, dataset=DatasetConfig(split="x", shuffle=False, mlm_probability=0.5))
    assert given.resolved(train=True) == given


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoaderConfig(name="txt"), r"k\.name: unknown loader 'txt'; did you mean 'text'"),
        (LoaderConfig(num_workers=-1), r"k\.num_workers"),
        (LoaderConfig(dataset=DatasetConfig(shuffle_algo="py1")), r"k\.dataset\.shuffle_algo.*did you mean"),
        (LoaderConfig(dataset=DatasetConfig(mlm_probability=30.0)), r"k\.dataset\.mlm_probability"),
        (LoaderConfig(dataset=DatasetConfig(masking="spans")), r"k\.dataset\.masking\.name: unknown masking 'spans'"),
        (LoaderConfig(dataset=DatasetConfig(masking={"name": "span", "mean_length": 1.0})), r"masking\.mean_length"),
        (LoaderConfig(dataset=DatasetConfig(download_retry=0)), r"k\.dataset\.download_retry: 0 is below 1"),
        (LoaderConfig(bucket_batches=-1), r"k\.bucket_batches"),
        (LoaderConfig(dataset=DatasetConfig(max_seq_len=0)), r"k\.dataset\.max_seq_len"),
        (LoaderConfig(dataset=DatasetConfig(eos_token_id=1, bos_token_id=2)), "not both"),
        (
            LoaderConfig(dataset=DatasetConfig(streams={"a": StreamConfig(proportion=0.5, repeat=2.0)})),
            r"k\.dataset\.streams\.a: set one of proportion, repeat",
        ),
        (
            LoaderConfig(dataset=DatasetConfig(streams={"a": StreamConfig(proportion=0.5), "b": StreamConfig()})),
            "every stream a proportion, or none",
        ),
    ],
)
def test_impossible_values_are_named(config, message):
    with pytest.raises(UserError, match=message):
        config.validate("k")


def test_streams_inherit_from_the_dataset():
    streams = {"a": StreamConfig(local="a"), "b": StreamConfig(split="other")}
    sources = LoaderConfig(dataset=DatasetConfig(local="x", split="train", streams=streams)).sources()
    assert {name: (source.local, source.split) for name, source in sources.items()} == {
        ".streams.a": ("a", "train"),
        ".streams.b": ("x", "other"),
    }
