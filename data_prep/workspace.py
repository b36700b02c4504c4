"""The folder a conversion fills, and what of it is finished.

While a conversion is under way, OUT_ROOT/.work/SPLITS holds its settings and one record for each finished unit.
A unit's shards are written to a temporary folder there and moved to OUT_ROOT/SPLIT/UNIT when they are complete;
its record, written last, is what makes it finished. Whatever else is found at the next start is made again.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from anymixer.data.shards import MANIFEST_NAME, read_manifest
from anymixer.errors import UserError
from anymixer.files import write_text_atomic
from data_prep.options import ConvertOptions
from data_prep.place import WORK, Place, place_of
from data_prep.remote import Remote
from data_prep.units import Unit

_LOCK = ".lock"
_SETTINGS = "settings.json"


class Workspace:
    """Context that holds a conversion's folder for this process, or for this shard of it.

    One conversion at a time works on a folder; its shards (`--shard i/n`) may do so together.
    """

    def __init__(self, options: ConvertOptions) -> None:
        self.place = place_of(options)
        self._shard = options.shard
        self._sole = self.alone
        self._begun = False
        self._locks: dict[Path, int] = {}

    @property
    def alone(self) -> bool:
        """Whether no other process may be at work here."""
        return self._shard[1] == 1

    def __enter__(self) -> Workspace:
        root = self.place.root
        self._made_root = not root.exists()
        try:
            root.mkdir(parents=True, exist_ok=True)
            self._lock(root / _LOCK, fcntl.LOCK_EX if self.alone else fcntl.LOCK_SH)
            if not self.alone:
                self._lock(root / f"{_LOCK}-{self._shard[0]}-of-{self._shard[1]}", fcntl.LOCK_EX)
            self.remote = self.place.remote()
            if self.remote is not None:
                self._take_up(self.remote)
        except BlockingIOError as error:
            self._release()
            raise UserError(f"--out_root: another conversion is writing to {root}") from error
        except OSError as error:
            self._release()
            raise UserError(f"--out_root: cannot write to {root} ({error.strerror or error})") from error
        except UserError:
            self._release()
            raise
        if self.alone:
            shutil.rmtree(self.place.work / "tmp", ignore_errors=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, UserError) and self._begun and self.alone and not self.place.finished():
            self._clear()
        self._release()

    def _take_up(self, remote: Remote) -> None:
        """Make what is known here agree with the remote OUT_ROOT: it is what counts."""
        names = remote.names(f"{WORK}/") | remote.names(MANIFEST_NAME)
        settings = self.place.work / _SETTINGS
        if self.place.name(settings) not in names:
            shutil.rmtree(self.place.work, ignore_errors=True)
        for path in (*(self.place.work / "units").glob("*.json"), self.place.root / MANIFEST_NAME):
            if self.place.name(path) not in names:
                path.unlink(missing_ok=True)
        may_change = {self.place.name(settings), MANIFEST_NAME}
        remote.download(name for name in names if name in may_change or not (self.place.root / name).is_file())

    def manifest(self) -> dict[str, Any] | None:
        """Return the manifest of the splits that are complete, None if there are none."""
        return read_manifest(self.place.root)

    def begin(self, settings: dict[str, Any], units: list[Unit]) -> None:
        """Record what is to be converted, or check that it is what was begun here.

        Raises:
            UserError: a conversion with other settings or inputs was begun here; the message names them.
        """
        path = self.place.work / _SETTINGS
        mine = json.loads(json.dumps({"settings": settings, "units": [unit.describe() for unit in units]}))
        if path.is_file():
            begun, finished = json.loads(path.read_text()), self.place.finished()
            changes = changed_settings(begun["settings"], mine["settings"])
            changes |= changed_inputs(*(_begun_inputs(each["units"], finished) for each in (begun, mine)))
            refuse_changes(self.place, "an unfinished conversion", changes)
        else:
            self._check_unused()
        self._begun = True
        write_text_atomic(path, json.dumps(mine, indent=1))
        self.send([path])

    def send(self, files: Iterable[Path]) -> None:
        """Copy files to the remote OUT_ROOT, if there is one."""
        if self.remote is not None:
            self.remote.upload(self.place.name(path) for path in files)

    def fetch(self) -> None:
        """Get the records that other processes have sent to the remote OUT_ROOT, if there is one."""
        if self.remote is not None:
            folder = f"{self.place.name(self.place.work)}/"
            absent = [name for name in self.remote.names(folder) if not (self.place.root / name).is_file()]
            self.remote.download(absent)

    def complete(self) -> None:
        """Remove what is kept for an unfinished conversion, unless other shards of it still run."""
        if not self.alone:
            try:
                fcntl.flock(self._locks[self.place.root / _LOCK], fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
            self._sole = True
            for path in self.place.root.glob(f"{_LOCK}-*"):
                path.unlink(missing_ok=True)
        self._forget()

    def _clear(self) -> None:
        """Undo a conversion that failed before any unit was finished, so that it can be begun in another way."""
        for split in self.place.splits:
            for unit in (self.place.root / split).glob("[0-9]" * 5):
                shutil.rmtree(unit)
            with suppress(OSError):  # not there, or not ours alone
                (self.place.root / split).rmdir()
        self._forget()

    def _forget(self) -> None:
        shutil.rmtree(self.place.work, ignore_errors=True)
        with suppress(OSError):  # not empty: other splits are unfinished
            self.place.work.parent.rmdir()

    def _check_unused(self) -> None:
        for other in (self.place.root / WORK).glob("*"):
            if set(other.name.split("+")) & set(self.place.splits) and other != self.place.work:
                what = f"an unfinished conversion with --splits {other.name.replace('+', ' ')}"
                raise UserError(f"--out_root: {self.place.root} holds {what}; finish it, or choose another folder")
        made = (self.manifest() or {"splits": {}})["splits"]
        for split in self.place.splits:
            folder = self.place.root / split
            if split not in made and folder.exists() and any(folder.iterdir()):
                raise UserError(f"--out_root: {folder} exists already; remove it or choose another --out_root")

    def _lock(self, path: Path, kind: int) -> None:
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            except OSError:
                os.close(descriptor)
                raise
            # The one who held it may have removed it, and another made a new one, since it was opened.
            if path.exists() and os.fstat(descriptor).st_ino == path.stat().st_ino:
                self._locks[path] = descriptor
                return
            os.close(descriptor)

    def _release(self) -> None:
        for path, descriptor in reversed(self._locks.items()):
            if self._sole or path.name != _LOCK:
                path.unlink(missing_ok=True)
            os.close(descriptor)
        if self._made_root:
            with suppress(OSError):  # not empty: it holds the result
                self.place.root.rmdir()


def changed_settings(theirs: dict[str, Any], mine: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Return the settings in which two conversions differ: flag -> what it was and what it is now."""
    return {name: (str(theirs.get(name)), str(value)) for name, value in mine.items() if theirs.get(name) != value}


def changed_inputs(theirs: list[dict[str, Any]], mine: list[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    """Return the same for two lists of inputs, as `Source.describe` gives them."""
    return {} if theirs == mine else {"input": (_shown(theirs), _shown(mine))}


def refuse_changes(place: Place, what: str, changes: dict[str, tuple[str, str]]) -> None:
    """Raise UserError unless nothing changed."""
    if changes:
        values = ", ".join(f"--{name} {was} (now {now})" for name, (was, now) in changes.items())
        redo = "use the same, remove the folder, or choose another --out_root"
        raise UserError(f"--out_root: {place.url or place.root} holds {what} with {values}; {redo}")


def _begun_inputs(units: list[dict[str, Any]], finished: set[str]) -> list[dict[str, Any]]:
    """Return the inputs of units: those of unfinished ones without sizes, since a file may have been repaired."""
    inputs = []
    for number, unit in enumerate(units):
        for part in unit["inputs"]:
            kept = part if f"{number:05}" in finished else {"name": part["name"]}
            inputs.append({**kept, "splits": unit["splits"]})
    return inputs


def _shown(inputs: list[dict[str, Any]]) -> str:
    sizes = {part["name"]: part.get("bytes") for part in inputs}
    first = " ".join(f"{name} of {size} bytes" if size else name for name, size in list(sizes.items())[:3])
    return first + (f" and {len(sizes) - 3} more" if len(sizes) > 3 else "")
