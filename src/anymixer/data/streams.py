"""A stream whose shards are what their index says, and which fetches again what is not.

Streaming verifies hashes only of shards it downloads or decompresses, gives up at the first mismatch, leaves the
damaged file where the next start finds it, and knows no sizes. Here

- a file that came from a remote and is damaged is removed and fetched again, with growing pauses;
- a file that is the only copy is never touched: one line names the shard, the file and what to do.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
from numpy.typing import NDArray
from streaming import Stream
from streaming.base.format import Reader
from streaming.base.world import World

from anymixer.data.shards import INDEX_NAME, REDO, ShardFile
from anymixer.errors import UserError

_FIRST_PAUSE = 1.0  # seconds, before the second attempt; doubled before each further one


class CheckedStream(Stream):
    """A `Stream` that checks, repairs from its remote, and says in one line what it cannot."""

    @property
    def is_cache(self) -> bool:
        """Whether the local folder holds copies of a remote's files."""
        return self.remote not in (None, self.local)

    def choose_hash(self, shards: list[Reader], default: str | None) -> None:
        """Set the hash to verify: this stream's own or the default; "auto" is one that all shards record."""
        wanted = self.validate_hash or default
        if wanted == "auto":
            common = set.intersection(*(set(shard.hashes) for shard in shards))
            wanted = min(common) if common else None
        self.validate_hash = wanted

    def check(self, shard: Reader) -> None:
        """Raise UserError if a file of the shard is here and damaged; one with a remote is removed instead."""
        for file in self._files(shard):
            try:
                self._check_file(file)
            except FileNotFoundError:  # to be fetched or decompressed, which checks it
                pass
            except UserError:
                if not self.is_cache:
                    raise
                file.path.unlink(missing_ok=True)

    def get_shards(self, world: World, allow_unsafe_types: bool) -> list[Reader]:
        """Fetch the index unless it is here, and read it; see `Stream.get_shards`."""
        try:
            return super().get_shards(world, allow_unsafe_types)
        except Exception as error:  # whatever a storage client raises
            if not self.is_cache:
                raise
            where = _join(self.remote, self.split, INDEX_NAME)
            raise UserError(f"{where}: cannot fetch or read the index of the data ({_reason(error)})") from error

    def set_up_local(self, shards: list[Reader], cache_usage_per_shard: NDArray[np.int64]) -> None:
        """Take stock of what is here; see `Stream.set_up_local`.

        A run killed while it downloaded may have left part of a file: without this, streaming takes it for whole.
        """
        if self.is_cache:
            for file in (file for shard in shards for file in self._files(shard)):
                if file.path.is_file() and file.path.stat().st_size != file.bytes:
                    file.path.unlink()
        super().set_up_local(shards, cache_usage_per_shard)

    def prepare_shard(self, shard: Reader) -> int:
        """Download and decompress a shard, verified; see `Stream.prepare_shard`.

        Raises:
            UserError: the shard cannot be had, after `download_retry` attempts where it has a remote.
        """
        attempts = self.download_retry if self.is_cache else 1
        for attempt in range(attempts):
            try:
                change = super().prepare_shard(shard)
                for file in self._files(shard):
                    if file.path.is_file():
                        file.check_size()
                return change
            except Exception as error:  # whatever a storage client or a decompressor raises
                # Nothing was fetched: streaming has tried that `download_retry` times already.
                repairable = self.is_cache and self._remove(shard)
                if not repairable or attempt + 1 == attempts:
                    raise self._failure(shard, error, repairable) from error
            sleep(_FIRST_PAUSE * 2**attempt)
        raise AssertionError("download_retry is at least 1")

    def _check_file(self, file: ShardFile) -> None:
        file.check_size()
        if self.validate_hash is not None:
            file.check_hash(self.validate_hash)

    def _files(self, shard: Reader) -> Iterator[ShardFile]:
        folder = Path(shard.dirname, shard.split)
        for pair in shard.file_pairs:
            for info in pair:
                if info is not None:
                    yield ShardFile(folder / info.basename, info.bytes, info.hashes)

    def _remove(self, shard: Reader) -> bool:
        """Remove the files of a shard; return whether there were any."""
        present = [file.path for file in self._files(shard) if file.path.is_file()]
        for path in present:
            path.unlink(missing_ok=True)
        return bool(present)

    def _failure(self, shard: Reader, error: Exception, fetched: bool) -> UserError:
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            where = Path(shard.dirname, shard.split)
            return UserError(
                f"{where}: no space left for shards; make room, or bound it with dataset.cache_limit=100gb"
            )
        file = next(reversed(list(self._files(shard))))  # the compressed form, where there is one
        if self.is_cache:
            where = _join(self.remote, self.split, file.path.relative_to(Path(shard.dirname, shard.split)))
            what = "is damaged" if fetched else "cannot be fetched"
            return UserError(
                f"{where}: the shard {what} ({self.download_retry} attempts, the last: {_reason(error)}); "
                "see that it is there and can be read, or convert the data again"
            )
        try:
            self._check_file(file)
        except FileNotFoundError:
            return UserError(f"{file.path}: the shard is missing; {REDO}")
        except UserError as found:
            return found
        return UserError(f"{file.path}: the shard cannot be read ({_reason(error)}); {REDO}")


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _join(*parts: Any) -> str:
    return "/".join(str(part).rstrip("/") for part in parts if part)
