"""Everything about the data that can be checked before any work: no device, no download, no decoding."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from anymixer.data.config import LoaderConfig, StreamConfig
from anymixer.data.shards import INDEX_NAME, Shard, check_files, is_packed, read_index, read_manifest
from anymixer.data.tokenization import tokenizer_fingerprint
from anymixer.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def check_data(config: LoaderConfig, key: str, tokenizer: PreTrainedTokenizerFast | None = None) -> None:
    """Raise UserError if the data of a resolved loader cannot be what the run needs.

    Checks the folders, the index, the size of every shard file that is here, the columns, the row length of
    pre-tokenized data and, given the `tokenizer`, that it is the one the data was made with.

    Args:
        config: as `LoaderConfig.resolved` returns it.
        key: the loader's name in the file, e.g. `train_loader`.
    """
    sources = config.sources()
    places = Counter((source.local, source.split) for source in sources.values() if source.local)
    for place, count in places.items():
        if count > 1:
            raise UserError(f"{key}.dataset.streams: {count} streams share the folder {'/'.join(map(str, place))}")
    for name, source in sources.items():
        shards = _check_source(source, f"{key}.dataset{name}")
        if shards is not None:
            _check_columns(shards, source)
            _check_row_length(shards, source, f"{key}.dataset", config.dataset.max_seq_len)
            _check_hash_name(shards, source.validate_hash or config.dataset.validate_hash, f"{key}.dataset")
            if tokenizer is not None:
                _check_tokenizer(str(source.local), shards, tokenizer)


def _check_source(source: StreamConfig, key: str) -> list[Shard] | None:
    """Return the shards of a stream whose index is here, None when it has still to be downloaded."""
    if source.local is None:
        # With a remote alone, streaming picks a temporary folder and refuses it when it exists already, as it
        # does from the second start on.
        what = "the folder to keep downloaded shards in" if source.remote else "a folder made by data_prep"
        raise UserError(f"{key}.local: not set; set data_local to {what}")
    folder = Path(source.local).expanduser() / (source.split or "")
    if source.remote is not None:
        # What is missing or cut will be fetched: `CheckedStream` sees to it.
        return read_index(folder) if (folder / INDEX_NAME).is_file() else None
    if not folder.is_dir():
        raise UserError(f"{folder}: no such data folder ({key}.local, data_local); {_how_to_make(source.local)}")
    shards = read_index(folder)
    check_files(shards)
    return shards


def _how_to_make(out_root: str) -> str:
    return (
        f"make it with: python -m data_prep.convert --dataset text --input FILES... --out_root {out_root} "
        "--tokenizer NAME_OR_FOLDER --concat_tokens MAX_SEQ_LEN (without files of your own: --dataset demo)"
    )


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
