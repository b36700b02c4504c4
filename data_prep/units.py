"""A conversion's units: what is read, converted and published by itself, and begun again if it was cut off."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

from anymixer.errors import UserError
from data_prep.catalogue import CATALOGUE, SMALL_SPLITS, VALIDATION_NAMES, HubCorpus
from data_prep.demo_corpus import demo_documents
from data_prep.hub import read_shards, revision_of, shard_count, split_names
from data_prep.options import ConvertOptions
from data_prep.sources import Meter, TextFormat, input_files, is_divisible, limited, read_file

# A large file of plain text is divided into ranges of this many bytes.
UNIT_BYTES = 64 << 20
_HASHED_AT_ONCE = 1 << 20


class Source(Protocol):
    """Where a unit's documents come from."""

    def read(self, meter: Meter) -> Iterator[str]:
        """Yield the documents, in order, none of them empty."""
        ...

    def describe(self) -> list[dict[str, Any]]:
        """Return what it reads, as the manifest says it, without opening it."""
        ...

    def fingerprint(self) -> str | None:
        """Return the XXH64 of the bytes it reads, None where there are none of our own."""
        ...


@dataclass(frozen=True)
class FileSource:
    """Files one after the other, or one range of one file."""

    paths: tuple[Path, ...]
    form: TextFormat
    begin: int = 0
    end: int | None = None

    def read(self, meter: Meter) -> Iterator[str]:
        """Yield the documents."""
        before = 0
        for path in self.paths:
            own = Meter()
            meter.position = lambda before=before, own=own: before + own.position() - self.begin
            yield from read_file(path, self.form, begin=self.begin, end=self.end, meter=own)
            before += path.stat().st_size

    def describe(self) -> list[dict[str, Any]]:
        """Return names and sizes, and the range if it is one."""
        sizes = [{"name": path.name, "bytes": path.stat().st_size} for path in self.paths]
        if self.end is not None:
            sizes[0]["range"] = [self.begin, min(self.end, sizes[0]["bytes"])]
        return sizes

    def fingerprint(self) -> str | None:
        """Return the hash of the files' bytes, or of the range's."""
        import xxhash

        digest = xxhash.xxh64()
        for path in self.paths:
            with open(path, "rb") as file:
                file.seek(self.begin)
                left = None if self.end is None else self.end - self.begin
                while block := file.read(_HASHED_AT_ONCE if left is None else min(_HASHED_AT_ONCE, left)):
                    digest.update(block)
                    left = None if left is None else left - len(block)
        return digest.hexdigest()


@dataclass(frozen=True)
class HubSource:
    """Some shards of a split of a dataset."""

    path: str
    subset: str | None
    split: str
    revision: str | None
    shards: tuple[int, ...]
    column: str

    def read(self, meter: Meter) -> Iterator[str]:
        """Yield the documents."""
        names = (self.path, self.subset, self.split, self.revision)
        yield from read_shards(*names, shards=self.shards, column=self.column)

    def describe(self) -> list[dict[str, Any]]:
        """Return the name and the revision."""
        name = "/".join(filter(None, (self.path, self.subset, self.split)))
        return [{"name": name, "revision": self.revision, "shard": number} for number in self.shards]

    def fingerprint(self) -> str | None:
        """Return None: the revision says it."""
        return None


@dataclass(frozen=True)
class DemoSource:
    """The demo corpus."""

    def read(self, meter: Meter) -> Iterator[str]:
        """Yield the documents."""
        yield from demo_corpus()

    def describe(self) -> list[dict[str, Any]]:
        """Return its name."""
        return [{"name": "demo"}]

    def fingerprint(self) -> str | None:
        """Return None: the versions of the packages say it."""
        return None


@lru_cache(maxsize=1)
def demo_corpus() -> tuple[str, ...]:
    """Return the demo corpus, which takes seconds to collect."""
    return tuple(demo_documents())


@dataclass(frozen=True)
class Unit:
    """A part of the corpus and the splits its documents go to: one, or several by the text of each document."""

    number: int
    source: Source
    splits: tuple[str, ...]
    max_docs: int | None = None
    max_bytes: int | None = None

    @property
    def name(self) -> str:
        """Its folder in every split, and its name among the finished."""
        return f"{self.number:05}"

    @property
    def bytes(self) -> int:
        """How much there is to read; 1 where that is not known."""
        total = 0
        for part in self.source.describe():
            begin, end = part.get("range", (0, part.get("bytes", 0)))
            total += end - begin
        return max(total, 1)

    def documents(self, meter: Meter | None = None) -> Iterator[str]:
        """Yield the documents up to the unit's limits."""
        yield from limited(self.source.read(meter or Meter()), max_docs=self.max_docs, max_bytes=self.max_bytes)

    def describe(self) -> dict[str, Any]:
        """Return what tells it from the unit of the same number of another conversion."""
        return {"splits": list(self.splits), "inputs": self.source.describe()}


def plan_units(options: ConvertOptions) -> list[Unit]:
    """Return the units of a conversion: the same ones for the same inputs.

    Raises:
        UserError: an input is missing, or a split has no source.
    """
    if options.dataset == "demo":
        plan: list[Unit] = [_unit(options, DemoSource(), options.splits)]
    elif options.dataset == "text":
        plan = _file_units(options, input_files(options.input), options.splits)
    elif options.input:
        plan = _local_corpus_units(options)
    else:
        plan = _hub_units(options)
    return [replace(unit, number=number) for number, unit in enumerate(plan)]


def split_of(document: str, splits: tuple[str, ...], val_fraction: float) -> str:
    """Return the split of a document: a function of its text, so that copies of it stay together.

    A single split takes every document.
    """
    if len(splits) == 1:
        return splits[0]
    draw = int.from_bytes(blake2b(document.encode(), digest_size=8).digest(), "big") / 2**64
    return "val" if draw < val_fraction else "train"


def _unit(options: ConvertOptions, source: Source, splits: tuple[str, ...], limit: int | None = None) -> Unit:
    limits = [count for count in (limit, options.max_docs) if count is not None]
    return Unit(0, source, splits, min(limits, default=None), options.max_bytes)


def _file_units(
    options: ConvertOptions, paths: list[Path], splits: tuple[str, ...], limit: int | None = None
) -> list[Unit]:
    form = TextFormat(options.doc_separator, options.text_column)
    if limit is not None or options.max_docs is not None or options.max_bytes is not None:
        # Where the limit falls depends on all that is before it.
        return [_unit(options, FileSource(tuple(paths), form), splits, limit)]
    units = []
    for path in paths:
        size = path.stat().st_size
        if size > UNIT_BYTES and is_divisible(path, form):
            ranges = range(0, size, UNIT_BYTES)
            sources = [FileSource((path,), form, begin, min(begin + UNIT_BYTES, size)) for begin in ranges]
        else:
            sources = [FileSource((path,), form)]
        units += [_unit(options, source, splits) for source in sources]
    return units


def _local_corpus_units(options: ConvertOptions) -> list[Unit]:
    """Return the units of a corpus from the Hub whose files are here; their names say which split they are of."""
    corpus = CATALOGUE.get(options.dataset, HubCorpus(options.dataset))
    files = input_files(options.input)
    if not corpus.splits:
        return _file_units(options, files, options.splits)
    units = []
    for split in options.splits:
        large, limit = SMALL_SPLITS.get(split, (split, None))
        own = [path for path in files if any(name in path.name for name in VALIDATION_NAMES) == (large == "val")]
        if not own:
            kind = "with" if large == "val" else "without"
            raise UserError(f"--splits: {split}: no --input file {kind} 'val' in its name")
        units += _file_units(options, own, (split,), limit)
    return units


def _hub_units(options: ConvertOptions) -> list[Unit]:
    corpus = CATALOGUE.get(options.dataset, HubCorpus(options.dataset))
    subset = options.data_subset or corpus.subset
    there = split_names(corpus.path, subset)
    own = dict(corpus.splits)
    if not own and (held_out := next((name for name in VALIDATION_NAMES if name in there), None)):
        own = {"train": "train", "val": held_out}
    revision = revision_of(corpus.path)

    def units_of(splits: tuple[str, ...], theirs: str, limit: int | None) -> list[Unit]:
        if theirs not in there:
            raise UserError(f"--splits: {corpus.path} has no split '{theirs}' (it has: {', '.join(there)})")
        count = shard_count(corpus.path, subset, theirs, revision)
        source = HubSource(corpus.path, subset, theirs, revision, tuple(range(count)), options.text_column)
        if limit is not None or options.max_docs is not None or options.max_bytes is not None:
            return [_unit(options, source, splits, limit)]
        return [_unit(options, replace(source, shards=(number,)), splits) for number in range(count)]

    if not own:
        return units_of(options.splits, "train", None)
    units = []
    for split in options.splits:
        large, limit = SMALL_SPLITS.get(split, (split, None))
        units += units_of((split,), own[large], limit)
    return units
