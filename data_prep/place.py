"""The folders of a conversion, and the records of its finished units."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anymixer.files import write_text_atomic
from data_prep.catalogue import is_remote
from data_prep.options import ConvertOptions
from data_prep.remote import Remote, open_remote
from data_prep.writer import SplitCounts

WORK = ".work"


@dataclass
class UnitRecord:
    """What is kept of a finished unit.

    Args:
        unit: `Unit.describe()`.
        fingerprint: `Source.fingerprint()`.
        shards: split -> entries of its MDS index, as streaming writes them.
        token_counts: split -> `[vocab]`, in a file of its own.
    """

    unit: dict[str, Any]
    fingerprint: str | None
    counts: dict[str, SplitCounts] = field(default_factory=dict)
    shards: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    token_counts: dict[str, NDArray[np.int64]] = field(default_factory=dict)


@dataclass(frozen=True)
class Place:
    """The folders of a conversion; plain values, so that processes can send it.

    Args:
        root: OUT_ROOT, or the folder that stands for it here when it is remote.
        splits: those the conversion makes.
        url: the remote OUT_ROOT.
    """

    root: Path
    splits: tuple[str, ...]
    url: str | None = None

    @property
    def work(self) -> Path:
        """The folder of what is kept until the conversion is complete."""
        return self.root / WORK / "+".join(self.splits)

    def remote(self) -> Remote | None:
        """Open the remote OUT_ROOT, if there is one."""
        return open_remote(self.url, self.root) if self.url else None

    def name(self, path: Path) -> str:
        """Return a path's name in the remote folder."""
        return path.relative_to(self.root).as_posix()

    def record_files(self, unit: str) -> tuple[Path, Path]:
        """Return where a unit's token counts and, made last, its record are."""
        return self.work / "units" / f"{unit}.npz", self.work / "units" / f"{unit}.json"

    def finished(self) -> set[str]:
        """Return the names of the finished units."""
        return {path.stem for path in (self.work / "units").glob("*.json")}

    def write_record(self, unit: str, record: UnitRecord) -> None:
        """Record a unit as finished."""
        counts_file, record_file = self.record_files(unit)
        counts_file.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(counts_file, **record.token_counts)  # pyright: ignore[reportArgumentType]
        plain = {
            "unit": record.unit,
            "fingerprint": record.fingerprint,
            "counts": {split: vars(counts) for split, counts in record.counts.items()},
            "shards": record.shards,
        }
        write_text_atomic(record_file, json.dumps(plain))

    def read_record(self, unit: str) -> UnitRecord:
        """Return the record of a finished unit."""
        counts_file, record_file = self.record_files(unit)
        plain = json.loads(record_file.read_text())
        with np.load(counts_file) as arrays:
            token_counts = {split: arrays[split] for split in arrays.files}
        counts = {split: SplitCounts(**values) for split, values in plain["counts"].items()}
        return UnitRecord(plain["unit"], plain["fingerprint"], counts, plain["shards"], token_counts)


def place_of(options: ConvertOptions) -> Place:
    """Return the folders of a conversion."""
    if not is_remote(options.out_root):
        return Place(Path(options.out_root).expanduser(), options.splits)
    url = str(options.out_root).rstrip("/")
    key = blake2b(url.encode(), digest_size=6).hexdigest()
    default = Path("~/.cache/anymixer/data_prep").expanduser() / key
    return Place((options.work_dir or default).expanduser(), options.splits, url)
