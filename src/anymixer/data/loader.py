"""From the settings of a loader to what Composer's Trainer takes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from anymixer.data.checks import check_batch_size, check_data
from anymixer.data.config import LoaderConfig
from anymixer.data.masking import Masking, Vocabulary, maskings
from anymixer.data.shards import is_packed, read_index, read_manifest
from anymixer.data.shared_memory import claim, starting_alone
from anymixer.data.words import word_marks
from anymixer.data.worker_process import end_with
from anymixer.errors import UserError
from anymixer.labels import IGNORED_LABEL

if TYPE_CHECKING:
    from composer.core import DataSpec
    from transformers import PreTrainedTokenizerFast

    from anymixer.data.dataset import TextDataset
    from anymixer.data.streams import CheckedStream
    from anymixer.data.text_loader import TextLoader

# Paths through the data when shuffling, streaming's number for one machine; and how many samples make one worth it.
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

    Its batches are dicts of int64 tensors `[device_batch_size, max_seq_len]`: `input_ids`, `labels`,
    `attention_mask` where there is padding, and `sequence_id` where rows are packed or the dataset names a
    separator. Taken over all ranks, the rows of a batch and their masks are a function of (seeds, epoch, step) alone.

    Args:
        config: settings; fields left to the loader's role are resolved here.
        device_batch_size: samples per rank and batch.
        seed: seed of the masks; the order of samples has its own, `dataset.shuffle_seed`.
        train: role. Training draws new masks every epoch, evaluation the same ones always.

    Raises:
        UserError: an impossible setting, or data that is missing, damaged, made for another tokenizer or less than
            a batch of all ranks (where the last, smaller one is left out).
    """
    from composer.core import DataSpec

    key = "train_loader" if train else "eval_loader"
    config = config.resolved(train=train)
    config.validate(key)
    if train and config.bucket_batches:
        raise UserError("train_loader.bucket_batches: would change which rows share a batch; it is for evaluation")
    check_data(config, key, tokenizer)
    dataset = _build_dataset(config, tokenizer, device_batch_size, seed, train, key)
    loader = _build_torch_loader(config, dataset, device_batch_size)
    size_key = f"global_{'train' if train else 'eval'}_batch_size"
    check_batch_size(config, device_batch_size * loader.world.num_ranks, size_key, dataset.epoch_size)
    return DataSpec(dataloader=loader, num_samples=dataset.epoch_size, get_num_tokens_in_batch=count_tokens)


def build_eval_loaders(
    config: LoaderConfig, tokenizer: PreTrainedTokenizerFast, *, device_batch_size: int, seed: int
) -> dict[str, DataSpec]:
    """Build the evaluation loaders of one rank by their labels: one per stream, or "eval" where there are none.

    Raises:
        UserError: as `build_loader`; and a stream with a proportion, which means nothing on its own.
    """
    options: dict[str, Any] = {"device_batch_size": device_batch_size, "seed": seed, "train": False}
    if not config.dataset.streams:
        return {"eval": build_loader(config, tokenizer, **options)}
    check_data(config.resolved(train=False), "eval_loader", tokenizer)
    loaders = {}
    for name, stream in config.dataset.streams.items():
        if stream.proportion is not None:
            raise UserError(
                f"eval_loader.dataset.streams.{name}.proportion: every stream is evaluated by itself; remove it "
                "(choose=1000 bounds how many rows are read)"
            )
        alone = replace(config, dataset=replace(config.dataset, streams={name: stream}))
        loaders[name] = build_loader(alone, tokenizer, **options)
    return loaders


def count_tokens(batch: Mapping[str, Tensor]) -> dict[str, int]:
    """Count the tokens of a batch as Composer wants them: read in all, and predicted.

    At least 1 is predicted, because Composer divides by the count.
    """
    mask, predicted = batch.get("attention_mask"), (batch["labels"] != IGNORED_LABEL).sum()
    if mask is None:
        return {"total": batch["labels"].numel(), "loss_generating": max(1, int(predicted))}
    total, predicted = torch.stack([mask.sum(), predicted]).tolist()  # a GPU is waited for once
    return {"total": total, "loss_generating": max(1, predicted)}


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

    from anymixer.data.dataset import TextDataset
    from anymixer.data.rows import RowReader

    settings = config.dataset
    if settings.max_seq_len is None:
        raise UserError(f"{key}.dataset.max_seq_len: not set; set max_seq_len")
    masking = _build_masking(config, tokenizer, key)
    separators = {"eos_token_id": settings.eos_token_id, "bos_token_id": settings.bos_token_id}
    world = World.detect()
    with starting_alone(node=world.node, leader=world.is_local_leader):
        try:
            dataset = TextDataset(
                streams=_streams(config),
                reader=RowReader(tokenizer, settings.max_seq_len, **separators),
                masking=masking,
                seed=seed,
                every_epoch_anew=train,
                pad_token_id=_pad_token_id(tokenizer, masking),
                check_hash=settings.validate_hash,
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
                shuffle_algo=settings.shuffle_algo or "py1s",
                shuffle_seed=settings.shuffle_seed,
                shuffle_block_size=settings.shuffle_block_size,
            )
        except UserError:
            raise
        except ValueError as error:  # streaming's checks of the settings, and of the cache folder's other users
            raise UserError(f"{key}.dataset: {' '.join(str(error).split())}") from error
        if world.is_local_leader:
            claim(dataset._shm_prefix_int)  # streaming has no public name for it
    if dataset.num_canonical_nodes is None:
        dataset.num_canonical_nodes = _canonical_nodes(dataset, world.num_nodes)
    if settings.shuffle_algo is None:
        dataset.shuffle_algo = "py1s" if _is_large(dataset) else "naive"
    # The indexes are all here now, also those of streams with a remote.
    dataset.numbered = any(id is not None for id in separators.values()) or _any_packed(config)
    return dataset


def _build_masking(config: LoaderConfig, tokenizer: PreTrainedTokenizerFast, key: str) -> Masking:
    dataset = config.dataset
    assert dataset.mlm_probability is not None, "resolved() sets it"
    cls, options = maskings.parse(dataset.masking, f"{key}.dataset.masking")
    special = np.zeros(len(tokenizer), np.bool_)
    special[tokenizer.all_special_ids] = True
    mask_token_id = tokenizer.mask_token_id
    if cls.predicts_masks and not isinstance(mask_token_id, int):
        raise UserError("tokenizer_name: the tokenizer has no mask_token, which masked-language models need")
    vocabulary = Vocabulary(
        size=len(tokenizer),
        mask_token_id=mask_token_id if isinstance(mask_token_id, int) else -1,
        special=special,
        words=partial(word_marks, tokenizer),  # a lambda could not go to workers that are spawned
    )
    return cls(options, dataset.mlm_probability, vocabulary)


def _pad_token_id(tokenizer: PreTrainedTokenizerFast, masking: Masking) -> int:
    """Return what fills up rows. Causal models' tokenizers may have no such token: any will do, nothing reads it."""
    if isinstance(tokenizer.pad_token_id, int):
        return tokenizer.pad_token_id
    if masking.predicts_masks:
        raise UserError("tokenizer_name: the tokenizer has no pad_token, which masked-language models need")
    return tokenizer.eos_token_id if isinstance(tokenizer.eos_token_id, int) else 0


def _any_packed(config: LoaderConfig) -> bool:
    for source in config.sources().values():
        folder = Path(str(source.local)).expanduser()
        if is_packed(read_index(folder / (source.split or ""))[0], read_manifest(folder)):
            return True
    return False


def _canonical_nodes(dataset: TextDataset, nodes: int) -> int:
    """Return how many paths through the data the ranks share out among them: the same for 1 to 64 machines.

    Paths of unequal length are filled up by repeating a sample, which would bias an evaluation and, where
    paths are short, training. Streaming wants their number to divide that of the machines, or the reverse.
    """
    paths = _CANONICAL_NODES if dataset.shuffle and _is_large(dataset) else 1
    return paths if paths % nodes == 0 or nodes % paths == 0 else paths * nodes


def _is_large(dataset: TextDataset) -> bool:
    return dataset.epoch_size >= _CANONICAL_NODES * _SAMPLES_PER_CANONICAL_NODE


def _streams(config: LoaderConfig) -> list[CheckedStream]:
    from anymixer.data.streams import CheckedStream

    streams = []
    for source in config.sources().values():
        assert source.local is not None, "check_data() refuses it"
        streams.append(CheckedStream(**{**vars(source), "local": str(Path(source.local).expanduser())}))
    return streams


def _build_torch_loader(config: LoaderConfig, dataset: TextDataset, batch_size: int) -> TextLoader:
    from anymixer.data.text_loader import TextLoader

    workers: dict[str, Any] = {}
    if config.num_workers:
        workers = {
            "prefetch_factor": config.prefetch_factor,
            "persistent_workers": config.persistent_workers,
            "worker_init_fn": partial(end_with, os.getpid()),
        }
        # Tokenizing a single text is not parallel; this silences the warning about it in forked workers.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    return TextLoader(
        dataset=dataset,
        batch_size=batch_size,
        bucket_batches=config.bucket_batches,
        collate_fn=collate,
        drop_last=config.drop_last,
        num_workers=config.num_workers,
        pin_memory=config.pin_memory and torch.cuda.is_available(),
        timeout=config.timeout if config.num_workers else 0,
        **workers,
    )
