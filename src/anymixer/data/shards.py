"""What a folder of MDS shards says of itself, and whether its files agree.

Format: `index.json` lists the shards with the name, size and hashes of each one's file, plain (`raw_data`)
and compressed (`zip_data`); see the documentation of MosaicML Streaming, "Dataset format".
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anymixer.errors import UserError

INDEX_NAME = "index.json"
MANIFEST_NAME = "manifest.json"


@dataclass(frozen=True)
class ShardFile:
    """One form of one shard: where it lies and what the index says of it."""

    path: Path
    bytes: int
    hashes: dict[str, str]

    def check_size(self) -> None:
        """Raise UserError unless the file has the size the index gives."""
        found = self.path.stat().st_size
        if found != self.bytes:
            what = "is empty" if found == 0 else "is truncated" if found < self.bytes else "is too long"
            raise UserError(f"{self.path}: the shard {what} ({found} bytes, {INDEX_NAME} says {self.bytes}); {REDO}")

    def check_hash(self, algorithm: str) -> None:
        """Raise UserError unless the file's contents have the hash the index gives."""
        from streaming.base.hashing import get_hash

        if get_hash(algorithm, self.path.read_bytes()) != self.hashes[algorithm]:
            raise UserError(f"{self.path}: the shard is damaged ({algorithm} differs from {INDEX_NAME}); {REDO}")


@dataclass(frozen=True)
class Shard:
    """One entry of the index."""

    samples: int
    columns: dict[str, str]  # name -> MDS encoding, e.g. "str" or "ndarray:uint16:128"
    raw: ShardFile
    zipped: ShardFile | None


REDO = "copy it again or convert the data again"


def read_index(folder: Path) -> list[Shard]:
    """Return the shards of a split folder.

    Raises:
        UserError: no index, an index that cannot be read, or one without samples.
    """
    path = folder / INDEX_NAME
    if not path.is_file():
        raise UserError(f"{folder}: no {INDEX_NAME}, so this is not a folder of MDS shards")
    try:
        entries: list[dict[str, Any]] = json.loads(path.read_text())["shards"]
        shards = [_shard(folder, entry) for entry in entries]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read as an index of MDS shards; {REDO}") from error
    if not sum(shard.samples for shard in shards):
        raise UserError(f"{folder}: the split is empty (no samples)")
    return shards


def check_files(shards: list[Shard]) -> None:
    """Raise UserError for a shard file that is missing or has another size than the index says.

    Of a compressed shard, either form will do.
    """
    for shard in shards:
        present = [form for form in (shard.raw, shard.zipped) if form is not None and form.path.is_file()]
        for form in present:
            form.check_size()
        if not present:
            raise UserError(f"{(shard.zipped or shard.raw).path}: the shard is missing; {REDO}")


def is_packed(shard: Shard, manifest: dict[str, Any] | None) -> bool:
    """Return whether the rows of a shard hold several sequences each, with their lengths.

    A `lengths` column of one number a row is a document a row, cut and pre-tokenized.
    """
    encoding = shard.columns.get("lengths")
    mode = (manifest or {}).get("mode", "packed")
    return encoding is not None and encoding.split(":")[2:] != ["1"] and mode == "packed"


def read_manifest(folder: str | Path) -> dict[str, Any] | None:
    """Return what `data_prep` recorded of the data in `folder`, or None for data made elsewhere.

    Raises:
        UserError: the manifest exists and cannot be read.
    """
    path = Path(folder) / MANIFEST_NAME
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path}: cannot be read; {REDO}") from error


def _shard(folder: Path, entry: dict[str, Any]) -> Shard:
    return Shard(
        samples=int(entry["samples"]),
        columns=dict(zip(entry["column_names"], entry["column_encodings"], strict=True)),
        raw=_file(folder, entry["raw_data"]),
        zipped=_file(folder, entry["zip_data"]) if entry.get("zip_data") else None,
    )


def _file(folder: Path, entry: dict[str, Any]) -> ShardFile:
    return ShardFile(folder / entry["basename"], int(entry["bytes"]), dict(entry["hashes"]))
