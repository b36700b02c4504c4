"""Reads sharded checkpoints, folders that FSDP writes, without running anything a file might hold.

Such a folder has a pickled index, `.metadata`, and one file of saved tensors and objects a rank. torch's own reader
unpickles the index and the objects whatever they are; here both hold what such checkpoints hold, or are refused.
"""

import io
import pickle
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata

from anymixer.errors import UserError
from anymixer.models.checkpoint_weights import RefusedCheckpoint, read_harmless

METADATA = ".metadata"
_TORCH = "torch.distributed.checkpoint."
_PATHS = {"PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"}
# The classes and functions that an index names: plain records, dtypes and paths.
_INDEX_NAMES = {
    f"{_TORCH}metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    f"{_TORCH}filesystem": {"_StorageInfo"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "pathlib": _PATHS,
    "pathlib._local": _PATHS,
}


class _IndexReader(pickle.Unpickler):
    """Unpickles the records of an index and nothing else."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        if global_name not in _INDEX_NAMES.get(module_name, ()):
            raise RefusedCheckpoint(f"it holds more than an index ({module_name}.{global_name})")
        return super().find_class(module_name, global_name)


class _GuardedReader(FileSystemReader):
    """torch's reader of shards, with an index that was read with care."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self) -> Metadata:
        return self._metadata


def read_index(folder: Path, key: str) -> Metadata:
    """The index of a folder of shards.

    Raises UserError naming `key` where it is missing or broken, RefusedCheckpoint where it holds anything but an
    index, or names a file outside its folder.
    """
    try:
        with open(folder / METADATA, "rb") as file:
            metadata = _IndexReader(file).load()
    except RefusedCheckpoint as error:
        raise RefusedCheckpoint(f"{key}: {folder / METADATA} is refused: {error}") from error
    except OSError as error:
        raise UserError(f"{key}: {folder} holds no whole checkpoint of shards ({METADATA} is missing)") from error
    except Exception as error:  # half a pickle may raise anything
        raise UserError(f"{key}: {folder / METADATA} is damaged: {str(error).splitlines()[:1]}") from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise UserError(f"{key}: {folder / METADATA} is no index of a checkpoint")
    for stored in metadata.storage_data.values():
        if Path(stored.relative_path).name != str(stored.relative_path):
            raise RefusedCheckpoint(f"{key}: {folder / METADATA} is refused: it names {stored.relative_path}")
    return metadata


def read_objects(folder: Path, metadata: Metadata, key: str, file: str | None = None) -> dict[str, Any]:
    """What a checkpoint's shards hold besides tensors, by its name there (`state.timestamp.batch`).

    file: of this shard alone. Raises RefusedCheckpoint for anything but tensors and harmless types, UserError for
    shards that are missing or broken.
    """
    objects = {}
    for index, stored in (metadata.storage_data or {}).items():
        if not isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            continue  # a tensor, which torch reads as nothing else
        if file is not None and stored.relative_path != file:
            continue
        name = f"{folder / stored.relative_path}, {index.fqn},"
        if getattr(stored, "transform_descriptors", None):
            raise RefusedCheckpoint(f"{key}: {name} is refused: it is transformed, so what it holds cannot be told")
        try:
            with open(folder / stored.relative_path, "rb") as shard:
                shard.seek(stored.offset)
                objects[index.fqn] = read_harmless(io.BytesIO(shard.read(stored.length)), key, name)
        except (RuntimeError, EOFError, OSError) as error:
            raise UserError(f"{key}: {name} cannot be read: {str(error).splitlines()[0][:160]}") from error
    return objects


def read_shards(folder: Path, key: str) -> dict[str, Any]:
    """A sharded checkpoint as `read_checkpoint` gives a whole one: the model's tensors, and all objects."""
    metadata = read_index(folder, key)
    prefix, content = "state.model.", {"state": {"model": _read_tensors(folder, metadata, "state.model.", key)}}
    for name, value in read_objects(folder, metadata, key).items():
        if not name.startswith(prefix):
            _place(content, (metadata.planner_data or {}).get(name, (name,)), value)
    return _with_lists(content)


def _with_lists(tree: Any) -> Any:
    """`tree` with its lists, of which torch writes the items one by one, under their places."""
    if not isinstance(tree, dict):
        return tree
    if tree and all(isinstance(key, int) for key in tree):
        return [_with_lists(tree[place]) for place in sorted(tree)]
    return {key: _with_lists(value) for key, value in tree.items()}


def _read_tensors(folder: Path, metadata: Metadata, prefix: str, key: str) -> dict[str, Tensor]:
    """All tensors below `prefix`, put together from the shards, on the CPU."""
    from torch.distributed import checkpoint

    tensors = {
        name.removeprefix(prefix): torch.empty(stored.size, dtype=stored.properties.dtype)
        for name, stored in metadata.state_dict_metadata.items()
        if name.startswith(prefix) and isinstance(stored, TensorStorageMetadata)
    }
    wanted = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*torch.distributed is (disabled|unavailable).*")
            checkpoint.load(wanted, storage_reader=_GuardedReader(folder, metadata), no_dist=True)
    except checkpoint.CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        raise UserError(f"{key}: {folder} is not a whole checkpoint: {str(reason).splitlines()[0][:160]}") from error
    return tensors


def _place(tree: dict[Any, Any], path: tuple[Any, ...], value: Any) -> None:
    for part in path[:-1]:
        tree = tree.setdefault(part, {})
    tree[path[-1]] = value
