"""Everything about the data that can be checked before any work: no device, no download, no decoding."""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from anymixer.data.config import LoaderConfig, StreamConfig
from anymixer.data.shards import INDEX_NAME, Shard, check_files, is_packed, read_index, read_manifest
from anymixer.data.tokenization import tokenizer_fingerprint
from anymixer.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


# Folders that the recipes name, and what data_prep calls what they hold.
_NAMED_CORPORA = ("c4", "demo")


def check_data(
    config: LoaderConfig,
    key: str,
    tokenizer: PreTrainedTokenizerFast | None = None,
    *,
    rows: str = "--tokenizer NAME_OR_FOLDER --pack_tokens MAX_SEQ_LEN",
) -> None:
    """Raise UserError if the data of a resolved loader cannot be what the run needs.

    Checks the folders, the index, the size of every shard file that is here, the columns, the row length of
    pre-tokenized data and, given the `tokenizer`, that it is the one the data was made with.

    Args:
        config: as `LoaderConfig.resolved` returns it.
        key: the loader's name in the file, e.g. `train_loader`.
        rows: flags with which `data_prep.convert` makes rows for the run, for the message that they are missing.
    """
    sources = config.sources()
    places = Counter((source.local, source.split) for source in sources.values() if source.local)
    for place, count in places.items():
        if count > 1:
            raise UserError(f"{key}.dataset.streams: {count} streams share the folder {'/'.join(map(str, place))}")
    for name, source in sources.items():
        shards = _check_source(source, f"{key}.dataset{name}", rows)
        if shards is not None:
            _check_columns(shards, source)
            _check_row_length(shards, source, f"{key}.dataset", config.dataset.max_seq_len)
            _check_hash_name(shards, source.validate_hash or config.dataset.validate_hash, f"{key}.dataset")
            if tokenizer is not None:
                _check_tokenizer(str(source.local), shards, tokenizer)


def check_batch_size(config: LoaderConfig, size: int, key: str, epoch: int | None = None) -> None:
    """Raise UserError where no whole global batch fills an epoch: training would begin empty ones for ever.

    Args:
        config: as `LoaderConfig.resolved` returns it.
        size: rows of a global batch; `key` sets it.
        epoch: rows of an epoch; None for what the indexes say, where they are here and say it all.
    """
    epoch = _stored_rows(config) if epoch is None else epoch
    if config.drop_last and epoch is not None and size > epoch:
        folders = ", ".join(str(_folder(source)) for source in config.sources().values())
        raise UserError(f"{key}: {size} is more than the {epoch:,} rows of an epoch ({folders}); use at most {epoch}")


def _stored_rows(config: LoaderConfig) -> int | None:
    """Return the rows of an epoch that reads every row once, None for others and for indexes not yet here."""
    sources = config.sources().values()
    weighted = any(weight is not None for each in sources for weight in (each.proportion, each.repeat, each.choose))
    if weighted or config.dataset.epoch_size is not None:
        return None
    folders = [_folder(source) for source in sources]
    if not all((folder / INDEX_NAME).is_file() for folder in folders):
        return None
    return sum(shard.samples for folder in folders for shard in read_index(folder))


def _folder(source: StreamConfig) -> Path:
    return Path(str(source.local)).expanduser() / (source.split or "")


def _check_source(source: StreamConfig, key: str, rows: str) -> list[Shard] | None:
    """Return the shards of a stream whose index is here, None when it has still to be downloaded."""
    if source.local is None:
        # With a remote alone, streaming picks a temporary folder and refuses it when it exists already, as it
        # does from the second start on.
        what = "the folder to keep downloaded shards in" if source.remote else "a folder made by data_prep"
        raise UserError(f"{key}.local: not set; set data_local to {what}")
    folder = _folder(source)
    if source.remote is not None:
        # What is missing or cut will be fetched: `CheckedStream` sees to it.
        return read_index(folder) if (folder / INDEX_NAME).is_file() else None
    if not folder.is_dir():
        raise UserError(f"{folder}: no such data folder ({key}.local, data_local); {_how_to_make(source.local, rows)}")
    shards = read_index(folder)
    check_files(shards)
    return shards


def _how_to_make(out_root: str, rows: str) -> str:
    own, name = "--dataset text --input FILES...", Path(out_root).name
    dataset, instead = own, "without files of your own: --dataset demo"
    if name in _NAMED_CORPORA:
        dataset, instead = f"--dataset {name}", f"of files of your own: {own}"
    command = f"python -m data_prep.convert {dataset} --out_root {shlex.quote(out_root)} {rows}"
    return f"make it with: {command} ({instead})"


def _check_columns(shards: list[Shard], source: StreamConfig) -> None:
    columns = shards[0].columns
    if "text" not in columns and "tokens" not in columns:
        names = ", ".join(columns)
        raise UserError(f"{source.local}/{source.split}: columns {names}; need 'text' or 'tokens'")


def _check_row_length(shards: list[Shard], source: StreamConfig, key: str, max_seq_len: int | None) -> None:
    """Rows of another length would be refused one by one, or be padded for nothing."""
    columns = shards[0].columns
    length, flag = None, "--concat_tokens"
    if "lengths" in columns:
        manifest = read_manifest(Path(str(source.local)).expanduser()) or {}
        length = manifest.get("max_seq_len")
        flag = "--pack_tokens" if is_packed(shards[0], manifest) else "--sequence_tokens"
    elif "tokens" in columns:
        encoding = columns["tokens"].split(":")
        # Rows of unknown length are checked one by one as they are read.
        length = int(encoding[2]) if encoding[0] == "ndarray" and len(encoding) == 3 else None
    if None not in (length, max_seq_len) and length != max_seq_len:
        raise UserError(
            f"{key}.max_seq_len: the rows in {source.local} hold {length} tokens, not {max_seq_len}; "
            f"set max_seq_len={length} or convert again with {flag} {max_seq_len}"
        )


def _check_hash_name(shards: list[Shard], algorithm: str | None, key: str) -> None:
    if algorithm in (None, "auto"):
        return
    for shard in shards:
        form = shard.zipped or shard.raw
        if algorithm not in form.hashes:
            known = ", ".join(sorted(form.hashes)) or "none"
            raise UserError(f"{key}.validate_hash: {form.path} has no '{algorithm}' hash (recorded: {known})")


def _check_tokenizer(local: str, shards: list[Shard], tokenizer: PreTrainedTokenizerFast) -> None:
    manifest = read_manifest(Path(local).expanduser())
    if manifest is None or "tokens" not in shards[0].columns or not manifest.get("tokenizer"):
        return
    made_with = manifest["tokenizer"]
    if made_with["fingerprint"] != tokenizer_fingerprint(tokenizer):
        raise UserError(
            f"tokenizer_name: the ids in {local} were made with another tokenizer ({made_with['name']}, "
            f"{made_with['vocab_size']} entries); set tokenizer_name={local}/tokenizer or convert again"
        )
