"""What a process does with one unit: read, filter, tokenize, write, and publish all of it at once."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from anymixer.data.shards import INDEX_NAME
from data_prep.duplicates import dropped_documents, text_hash, write_hashes
from data_prep.place import Place, UnitRecord
from data_prep.sources import Meter
from data_prep.tokenizing import Vocabulary, batches, tokenized
from data_prep.units import Unit, split_of
from data_prep.writer import Ids, RowFormat, SplitCounts, SplitWriter


@dataclass(frozen=True)
class Job:
    """What is to be made of every unit; plain values, so that processes can send it."""

    place: Place
    rows: RowFormat
    vocabulary: Vocabulary | None
    val_fraction: float
    min_chars: int | None = None
    max_chars: int | None = None
    dedup: bool = False

    def keeps(self, document: str) -> bool:
        """Whether the length filter lets a document pass."""
        return (self.min_chars or 0) <= len(document) <= (self.max_chars or len(document))


class Watch(Protocol):
    """Who follows the work."""

    def count(self, documents: int, tokens: int, position: int) -> None:
        """Add documents and tokens, and tell how many bytes of the unit are read; raises to stop the work."""
        ...

    def has_idle_cores(self) -> bool:
        """Whether some of the cores have no unit to work on."""
        ...


def hash_unit(job: Job, unit: Unit, watch: Watch) -> None:
    """Store the hashes of a unit's documents, those left by the length filter, in their order."""
    meter = Meter()
    hashes: list[bytes] = []
    for group in batches(unit.documents(meter)):
        hashes += [text_hash(document) for document in group if job.keeps(document)]
        watch.count(len(group), 0, meter.position())
    path = write_hashes(job.place, unit, hashes)
    if (remote := job.place.remote()) is not None:
        remote.upload([job.place.name(path)])


def convert_unit(job: Job, unit: Unit, watch: Watch) -> None:
    """Convert a unit and publish it: its shards, then its record. Does nothing if that has been done."""
    if unit.name in job.place.finished():
        return
    work = job.place.work / "tmp"
    temporary = work / f"{unit.name}-{os.getpid()}"
    for leftover in work.glob(f"{unit.name}-*"):  # of a killed process: a unit is given to one at a time
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        record = _write(job, unit, temporary, watch)
        _publish(job.place, unit, temporary, record)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(job: Job, unit: Unit, temporary: Path, watch: Watch) -> UnitRecord:
    meter = Meter()
    writers: dict[str, SplitWriter] = {}
    counts = {split: SplitCounts() for split in unit.splits}
    for documents, ids in _encoded(job, _kept(job, unit, meter, counts), watch):
        for split, own in _by_split(job, unit, documents).items():
            if split not in writers:
                writers[split] = job.rows.writer(temporary / split, job.vocabulary)
            writers[split].write([documents[i] for i in own], [ids[i] for i in own] if ids else ())
        watch.count(len(documents), sum(map(len, ids)), meter.position())
    record = UnitRecord(unit.describe(), unit.source.fingerprint(), counts)
    for split, writer in writers.items():
        writer.finish()
        counts[split].add(writer.counts)
        record.token_counts[split] = writer.token_counts
        record.shards[split] = json.loads((temporary / split / INDEX_NAME).read_text())["shards"]
    return record


def _encoded(job: Job, documents: Iterator[str], watch: Watch) -> Iterator[tuple[list[str], list[Ids]]]:
    """Yield batches of documents, with their ids where ids are written."""
    if job.rows.row_tokens is None or job.vocabulary is None:
        yield from ((group, []) for group in batches(documents))
    else:
        yield from tokenized(batches(documents), job.vocabulary, threaded=watch.has_idle_cores)


def _kept(job: Job, unit: Unit, meter: Meter, counts: dict[str, SplitCounts]) -> Iterator[str]:
    """Yield the unit's documents but those too short, too long or seen before, which are counted."""
    dropped = dropped_documents(job.place, unit) if job.dedup else frozenset()
    number = -1
    for document in unit.documents(meter):
        if not job.keeps(document):
            counts[split_of(document, unit.splits, job.val_fraction)].filtered += 1
            continue
        number += 1
        if number in dropped:
            counts[split_of(document, unit.splits, job.val_fraction)].duplicates += 1
        else:
            yield document


def _by_split(job: Job, unit: Unit, documents: list[str]) -> dict[str, list[int]]:
    """Return which documents go to which split."""
    own: dict[str, list[int]] = {}
    for number, document in enumerate(documents):
        own.setdefault(split_of(document, unit.splits, job.val_fraction), []).append(number)
    return own


def _publish(place: Place, unit: Unit, temporary: Path, record: UnitRecord) -> None:
    """Move a unit's shards into place, record it as finished, and send both to the remote OUT_ROOT."""
    folders = []
    for split in record.shards:
        target = place.root / split / unit.name
        _to_disk(temporary / split)
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():  # published, but not recorded, before the process was killed
            shutil.rmtree(target)
        os.replace(temporary / split, target)
        _to_disk(target.parent)
        folders.append(target)
    place.write_record(unit.name, record)
    if (remote := place.remote()) is not None:
        # The record last; on the Hub, all in one commit. Until it is there, the unit is not finished.
        shards = (path for folder in folders for path in sorted(folder.iterdir()))
        remote.upload([place.name(path) for path in (*shards, *place.record_files(unit.name))])
        for folder in folders:
            shutil.rmtree(folder)


def _to_disk(folder: Path) -> None:
    """Have a folder's files on the disk before its record is: a machine may lose power between the two."""
    for path in (*(file for file in folder.iterdir() if file.is_file()), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
