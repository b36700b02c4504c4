"""From the settings of a loader to what Composer's Trainer takes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anymixer.data.checks import check_data
from anymixer.data.config import LoaderConfig
from anymixer.data.shared_memory import claim, starting_alone
from anymixer.errors import UserError
from anymixer.labels import IGNORED_LABEL

if TYPE_CHECKING:
    from composer.core import DataSpec
    from streaming import Stream, StreamingDataLoader
    from transformers import PreTrainedTokenizerFast

    from anymixer.data.dataset import TextDataset

# Paths through the data per node when shuffling, as in streaming; and how many samples make one worth it.
_CANONICAL_NODES = 64
_SAMPLES_PER_CANONICAL_NODE = 1000


def build_loader(
    config: LoaderConfig,
    tokenizer: PreTrainedTokenizerFast,
    *,
    device_batch_size: int,
    seed: int,
    train: bool,
) -> DataSpec:
    """Build the loader of one rank.

    Its batches are dicts of int64 tensors `[device_batch_size, max_seq_len]`: `input_ids`, `attention_mask`,
    `labels`, and `sequence_id` where the dataset names a separator. Samples and masks are the same for any
    number of workers and, taken over all ranks, for any number of ranks of a node.

    Args:
        config: settings; fields left to the loader's role are resolved here.
        device_batch_size: samples per rank and batch.
        seed: seed of the masks; the order of samples has its own, `dataset.shuffle_seed`.
        train: role. Training draws new masks every epoch, evaluation the same ones always.

    Raises:
        UserError: an impossible setting, or data that is missing, damaged or made for another tokenizer.
    """
    from composer.core import DataSpec

    key = "train_loader" if train else "eval_loader"
    config = config.resolved(train=train)
    config.validate(key)
    check_data(config, key, tokenizer)
    dataset = _build_dataset(config, tokenizer, device_batch_size, seed, train, key)
    loader = _build_torch_loader(config, dataset, device_batch_size)
    return DataSpec(dataloader=loader, num_samples=dataset.epoch_size, get_num_tokens_in_batch=count_tokens)


def count_tokens(batch: Mapping[str, Tensor]) -> dict[str, int]:
    """Count the tokens of a batch as Composer wants them: read in all, and predicted.

    At least 1 is predicted, because Composer divides by the count.
    """
    predicted = int((batch["labels"] != IGNORED_LABEL).sum())
    return {"total": int(batch["attention_mask"].sum()), "loss_generating": max(1, predicted)}


def collate(rows: Sequence[Mapping[str, NDArray[np.int64]]]) -> dict[str, Tensor]:
    """Stack rows of `[length]` arrays into `[batch, length]` tensors."""
    return {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}


def _build_dataset(
    config: LoaderConfig,
    tokenizer: PreTrainedTokenizerFast,
    batch_size: int,
    seed: int,
    train: bool,
    key: str,
) -> TextDataset:
    from streaming.base.world import World

    from anymixer.data.dataset import MaskingOptions, TextDataset

    settings = config.dataset
    if settings.max_seq_len is None:
        raise UserError(f"{key}.dataset.max_seq_len: not set; set max_seq_len")
    assert settings.mlm_probability is not None, "resolved() sets it"
    world = World.detect()
    with starting_alone(leader=world.is_local_leader):
        try:
            dataset = TextDataset(
                tokenizer=tokenizer,
                max_seq_len=settings.max_seq_len,
                masking=MaskingOptions(settings.mlm_probability, seed, every_epoch_anew=train),
                eos_token_id=settings.eos_token_id,
                bos_token_id=settings.bos_token_id,
                check_hash=settings.validate_hash,
                streams=_streams(config),
                batch_size=batch_size,
                shuffle=settings.shuffle,
                download_retry=settings.download_retry,
                download_timeout=settings.download_timeout,
                keep_zip=settings.keep_zip,
                epoch_size=settings.epoch_size,
                predownload=settings.predownload,
                cache_limit=settings.cache_limit,
                partition_algo=settings.partition_algo,
                num_canonical_nodes=settings.num_canonical_nodes,
                shuffle_algo=settings.shuffle_algo,
                shuffle_seed=settings.shuffle_seed,
            )
        except ValueError as error:  # streaming's checks of the settings, and of the cache folder's other users
            raise UserError(f"{key}.dataset: {' '.join(str(error).split())}") from error
        if world.is_local_leader:
            claim(dataset._shm_prefix_int)  # streaming has no public name for it
    if dataset.num_canonical_nodes is None:
        dataset.num_canonical_nodes = _canonical_nodes(dataset, world.num_nodes)
    return dataset


def _canonical_nodes(dataset: TextDataset, nodes: int) -> int:
    """Return how many paths through the data the ranks of `nodes` machines share out among them.

    Paths of unequal length are filled up by repeating a sample, which would bias an evaluation and, where
    paths are short, training.
    """
    large = dataset.epoch_size >= _CANONICAL_NODES * nodes * _SAMPLES_PER_CANONICAL_NODE
    return _CANONICAL_NODES * nodes if dataset.shuffle and large else nodes


def _streams(config: LoaderConfig) -> list[Stream]:
    from streaming import Stream

    streams = []
    for source in config.sources().values():
        assert source.local is not None, "check_data() refuses it"
        streams.append(Stream(**{**vars(source), "local": str(Path(source.local).expanduser())}))
    return streams


def _build_torch_loader(config: LoaderConfig, dataset: TextDataset, batch_size: int) -> StreamingDataLoader:
    from streaming.base.world import World

    from anymixer.data.text_loader import TextLoader

    workers: dict[str, Any] = {}
    if config.num_workers:
        workers = {"prefetch_factor": config.prefetch_factor, "persistent_workers": config.persistent_workers}
        # Tokenizing a single text is not parallel; this silences the warning about it in forked workers.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return TextLoader(
        ranks=World.detect().num_ranks,
        dataset=dataset,
        batch_size=batch_size,
        collate_fn=collate,
        drop_last=config.drop_last,
        num_workers=config.num_workers,
        pin_memory=config.pin_memory and torch.cuda.is_available(),
        timeout=config.timeout if config.num_workers else 0,
        **workers,
    )
