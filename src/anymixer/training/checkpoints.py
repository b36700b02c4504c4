"""Find the newest checkpoint that reads back whole, whenever the run before was killed.

Composer 0.32.1 writes a checkpoint in place, then removes `latest-rank0.pt` and makes it anew, so a kill
may leave half a file, or a symlink that is missing, dangling or one checkpoint behind. `recover` puts that
right before a Trainer exists. It renames and re-links, and deletes nothing.
"""

import os
import re
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from anymixer.errors import UserError
from anymixer.models.checkpoint_weights import RefusedCheckpoint

LATEST = "latest-rank0.pt"
# Composer's default names: a file written by rank 0, or a folder of shards written by all ranks.
_NAME = re.compile(r"ep(?P<epoch>\d+)-ba(?P<batch>\d+)(?P<whole>-rank0\.pt)?")


@dataclass(frozen=True)
class Recovery:
    """What `recover` found: the checkpoint to continue from, and the broken ones it renamed."""

    checkpoint: Path | None
    set_aside: list[Path] = field(default_factory=list)

    def describe(self, folder: Path) -> str:
        """Return one line for the start of the run."""
        names = ", ".join(path.name for path in self.set_aside)
        broken = f"; set aside as broken: {names}" if names else ""
        if self.checkpoint is None:
            return f"no checkpoint in {folder}: starting from the beginning{broken}"
        return f"continuing from {self.checkpoint}{broken}"


def recover(folder: Path, *, sharded: bool = False) -> Recovery:
    """Make `latest-rank0.pt` point to the newest whole checkpoint of `folder`.

    From the newest to the oldest, checkpoints that do not read back whole are renamed to NAME.broken,
    until one does.

    Args:
        folder: where the run saves; it need not exist.
        sharded: whether this run writes folders of shards (FSDP2 with `state_dict_type: sharded`).

    Raises:
        UserError: the newest whole checkpoint is of the other kind, which this run could not load, or holds more than
            tensors and harmless types (RefusedCheckpoint).
    """
    from anymixer.training.checkpoint_guard import check_harmless

    set_aside = []
    for path in reversed(list_checkpoints(folder)):
        if not is_whole(path):
            set_aside.append(_set_aside(path))
            continue
        if path.is_dir() != sharded:
            raise UserError(f"autoresume: {_wrong_kind(path)}")
        check_harmless(path, "autoresume")
        _point_latest_to(path)
        return Recovery(path, set_aside)
    return Recovery(None, set_aside)


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of `folder`, files and folders of shards, from the oldest to the newest."""
    if not folder.is_dir():
        return []
    paths = {path.name: path for path in folder.iterdir() if not path.is_symlink()}
    return [paths[name] for name in checkpoint_names(paths)]


def checkpoint_names(names: Iterable[str]) -> list[str]:
    """Of the names in a folder, return those of checkpoints, from the oldest to the newest."""
    found = []
    for name in names:
        match = _NAME.fullmatch(name)
        if match is not None:
            found.append((int(match["batch"]), int(match["epoch"]), name))
    return [name for *_, name in sorted(found)]


def is_whole(path: Path) -> bool:
    """Read a checkpoint back: checksums of a file's tensors, extents of a folder's shards."""
    return _shards_are_whole(path) if path.is_dir() else _file_is_whole(path)


def named_checkpoint(text: str) -> str:
    """Return what a `load_path` names: of a run's folder its newest checkpoint, and else itself."""
    checkpoints = [] if "://" in text else list_checkpoints(_local(text))
    return str(checkpoints[-1]) if checkpoints else text


def check_load_path(text: str, *, sharded: bool = False) -> None:
    """Raise UserError, naming `load_path`, for one that is missing, broken, of the wrong kind, or would run code.

    Of URIs of object stores (s3://...) only the name is checked here, the rest when Composer has fetched them.
    """
    from anymixer.models.checkpoint_shards import METADATA
    from anymixer.training.checkpoint_guard import check_harmless, check_name

    check_name(text, "load_path")
    if "://" in text:
        return
    path = _local(text)
    if not path.exists():
        raise UserError(f"load_path: {path} does not exist")
    if path.is_dir() and not (path / METADATA).is_file():
        raise UserError(f"load_path: {path} holds no whole checkpoint; name a run's folder or a checkpoint in it")
    if path.is_dir() != sharded:
        raise UserError(f"load_path: {_wrong_kind(path)}")
    if not is_whole(path):
        raise UserError(f"load_path: {path} is no whole checkpoint (truncated or damaged); name an older one")
    check_harmless(path, "load_path")


def _local(text: str) -> Path:
    return Path(text.format(rank=0, local_rank=0, node_rank=0))


def _file_is_whole(path: Path) -> bool:
    # torch writes a zip whose directory comes last, with a CRC-32 of every record.
    try:
        with zipfile.ZipFile(path) as archive:
            has_pickle = any(name.endswith("data.pkl") for name in archive.namelist())
            return has_pickle and archive.testzip() is None
    except (zipfile.BadZipFile, EOFError, OSError):
        return False


def _shards_are_whole(path: Path) -> bool:
    from anymixer.models.checkpoint_shards import read_index

    # The index is renamed into place after all ranks have written their shards.
    try:
        metadata = read_index(path, "checkpoint")
    except RefusedCheckpoint:
        raise
    except UserError:
        return False
    ends: dict[str, int] = {}
    for shard in (metadata.storage_data or {}).values():
        ends[shard.relative_path] = max(ends.get(shard.relative_path, 0), shard.offset + shard.length)
    return all((path / name).is_file() and (path / name).stat().st_size >= end for name, end in ends.items())


def _wrong_kind(path: Path) -> str:
    if path.is_dir():
        return f"{path} holds shards; set parallelism_config.fsdp.state_dict_type=sharded to load it"
    return f"{path} is a whole file; set parallelism_config.fsdp.state_dict_type=full to load it"


def _set_aside(path: Path) -> Path:
    target, number = path.with_name(f"{path.name}.broken"), 2
    while target.exists():
        target, number = path.with_name(f"{path.name}.broken-{number}"), number + 1
    path.rename(target)
    return target


def _point_latest_to(path: Path) -> None:
    latest = path.with_name(LATEST)
    if latest.exists() and not latest.is_symlink():
        return  # a checkpoint that Composer downloaded under this name
    if latest.is_symlink() and os.readlink(latest) == path.name:
        return
    link = path.with_name(f".{LATEST}.{os.getpid()}")
    link.unlink(missing_ok=True)
    link.symlink_to(path.name)
    os.replace(link, latest)
