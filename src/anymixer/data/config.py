"""Settings of a data loader under the names MosaicBERT's YAML files use.

`None` means "by its role or inherited": `LoaderConfig.resolved` fills what depends on whether the loader
trains or evaluates; `data_local`, `max_seq_len` and the like come down from the top of the file.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from anymixer.data.masking import maskings
from anymixer.errors import UserError, suggest

# Streaming's names; a test compares them with the installed version's own tables.
SHUFFLE_ALGOS = ("naive", "py1br", "py1e", "py1s", "py2s")
PARTITION_ALGOS = ("orig", "relaxed")

_COUNTS = ("max_seq_len", "num_canonical_nodes", "predownload", "download_retry", "shuffle_block_size")

# Keys of older streaming versions: refused by name, with what replaces them.
RENAMED_DATASET = {
    "keep_raw": "streaming removed it; cache_limit (e.g. 100gb) bounds the space that downloaded shards take",
    "samples_per_epoch": "streaming calls it epoch_size now",
}
RENAMED_STREAM = {"samples": "streaming calls it choose now"}


@dataclass
class StreamConfig:
    """One of several sources mixed into a dataset; unset fields are the dataset's."""

    RENAMED: ClassVar[dict[str, str]] = RENAMED_STREAM

    local: str | None = None
    remote: str | None = None
    split: str | None = None
    # At most one: share of the mixture; times the stream is seen per epoch; samples drawn per epoch.
    proportion: float | None = None
    repeat: float | None = None
    choose: int | None = None
    download_retry: int | None = None
    download_timeout: float | None = None
    validate_hash: str | None = None
    keep_zip: bool | None = None


@dataclass
class DatasetConfig:
    """MDS shards of text or token ids, their order, and how their tokens are masked."""

    RENAMED: ClassVar[dict[str, str]] = RENAMED_DATASET

    local: str | None = None  # folder that holds the splits; the cache when `remote` is set
    remote: str | None = None
    split: str | None = None  # None: "train" or "val", by the loader's role
    max_seq_len: int | None = None
    shuffle: bool | None = None  # None: training only
    mlm_probability: float | None = None  # None: 0.30 in training, 0.15 in evaluation
    # A name of `masking.maskings`, or a mapping of it and its options: {name: span, mean_length: 3.8}.
    masking: Any = "bert"
    tokenizer_name: str | None = None  # accepted for old files: there is one tokenizer, the top-level one
    # None: by the number of rows: "naive", a permutation of all, or, where that would need too many shards at
    # once, "py1s": shards in random order on every path (see num_canonical_nodes), rows in random order in each.
    shuffle_algo: str | None = None
    shuffle_seed: int = 9176
    shuffle_block_size: int | None = None  # samples that py1e and py1br mix; None: streaming's own
    # Independent paths through the data. None: 64 when shuffling and the data is large enough for it, else 1,
    # which is the only value that never repeats a sample to fill up a path. The order of the samples depends on
    # it and not on the number of machines; that number must divide it, or be a multiple of it.
    num_canonical_nodes: int | None = None
    predownload: int | None = None  # samples; None: 8 batches
    partition_algo: str = "orig"
    # Attempts to fetch a file, with growing pauses; and as many to fetch a shard again that came damaged.
    download_retry: int = 4
    download_timeout: float = 60.0  # seconds
    # Checked when a shard is first opened. "auto": the hash its index records; null: sizes only.
    validate_hash: str | None = "auto"
    keep_zip: bool = False
    epoch_size: int | str | None = None
    cache_limit: int | str | None = None
    streams: dict[str, StreamConfig] | None = None
    # Rows that pack several sequences: the token that ends (or begins) each. Adds `sequence_id`.
    eos_token_id: int | None = None
    bos_token_id: int | None = None


@dataclass
class LoaderConfig:
    """A data loader: its dataset and its worker processes."""

    name: str = "text"
    drop_last: bool | None = None  # None: training only
    num_workers: int = 8
    pin_memory: bool = True  # on a machine with a GPU
    prefetch_factor: int = 2  # batches per worker
    persistent_workers: bool = True
    timeout: float = 0.0  # seconds to wait for a worker; 0: for ever
    # Evaluation: sort the rows of this many batches by length and cut each batch to its longest. 0: do not.
    bucket_batches: int = 0
    dataset: DatasetConfig = field(default_factory=DatasetConfig)

    def resolved(self, *, train: bool) -> LoaderConfig:
        """Return a copy in which the fields that depend on the loader's role are set."""
        defaults: dict[str, Any] = {
            "split": "train" if train else "val",
            "shuffle": train,
            "mlm_probability": 0.30 if train else 0.15,
        }
        unset = {name: value for name, value in defaults.items() if getattr(self.dataset, name) is None}
        drop_last = train if self.drop_last is None else self.drop_last
        return replace(self, drop_last=drop_last, dataset=replace(self.dataset, **unset))

    def validate(self, key: str) -> None:
        """Raise UserError for an impossible value; `key` is this loader's name in the file."""
        if self.name != "text":
            raise UserError(f"{key}.name: unknown loader '{self.name}'{suggest(self.name, ['text'])}; known: text")
        for name, lowest in (("num_workers", 0), ("prefetch_factor", 1), ("timeout", 0), ("bucket_batches", 0)):
            if getattr(self, name) < lowest:
                raise UserError(f"{key}.{name}: {getattr(self, name)} is below {lowest}")
        _validate_dataset(self.dataset, f"{key}.dataset")

    def sources(self) -> dict[str, StreamConfig]:
        """Return the streams by their key in the file, unset places filled from the dataset."""
        dataset = self.dataset
        if not dataset.streams:
            return {"": StreamConfig(local=dataset.local, remote=dataset.remote, split=dataset.split)}
        return {
            f".streams.{name}": replace(
                stream,
                local=stream.local or dataset.local,
                remote=stream.remote or dataset.remote,
                split=stream.split or dataset.split,
            )
            for name, stream in dataset.streams.items()
        }


def _validate_dataset(config: DatasetConfig, key: str) -> None:
    probability = config.mlm_probability
    if probability is not None and not 0 < probability < 1:
        raise UserError(f"{key}.mlm_probability: {probability} is not between 0 and 1")
    _, options = maskings.parse(config.masking, f"{key}.masking")
    options.validate(f"{key}.masking", 0.30 if probability is None else probability)
    if config.eos_token_id is not None and config.bos_token_id is not None:
        raise UserError(f"{key}: set eos_token_id or bos_token_id, not both")
    for name, known in (("shuffle_algo", SHUFFLE_ALGOS), ("partition_algo", PARTITION_ALGOS)):
        value = getattr(config, name)
        if value is not None and value not in known:
            raise UserError(f"{key}.{name}: unknown '{value}'{suggest(value, known)}; known: {', '.join(known)}")
    for name in (*_COUNTS, "shuffle_seed"):
        value, lowest = getattr(config, name), 1 if name in _COUNTS else 0
        if value is not None and value < lowest:
            raise UserError(f"{key}.{name}: {value} is below {lowest}")
    if config.download_timeout <= 0:
        raise UserError(f"{key}.download_timeout: {config.download_timeout} is not a positive number of seconds")
    _validate_streams(config, key)


def _validate_streams(config: DatasetConfig, key: str) -> None:
    streams = config.streams or {}
    for name, stream in streams.items():
        weights = [weight for weight in ("proportion", "repeat", "choose") if getattr(stream, weight) is not None]
        if len(weights) > 1:
            raise UserError(f"{key}.streams.{name}: set one of {', '.join(weights)}")
        for weight in weights:
            if getattr(stream, weight) < 0:
                raise UserError(f"{key}.streams.{name}.{weight}: {getattr(stream, weight)} is negative")
    relative = [stream.proportion is not None for stream in streams.values()]
    if any(relative) and not all(relative):
        raise UserError(f"{key}.streams: give every stream a proportion, or none")
