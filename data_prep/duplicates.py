"""Exact de-duplication over all units: of equal documents, the first in the order of the units stays.

Every unit's documents are hashed first. From all hashes together follows which documents of which unit are left
out, whatever processes do the work and in whatever order.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np

from data_prep.place import Place
from data_prep.units import Unit

_HASH_BYTES = 16  # two of a billion documents share one by chance once in 10^20 corpora
_HASH = np.dtype([("high", "<u8"), ("low", "<u8")])
# Hashes compared at once: 24 bytes of memory each, and as much again to sort them.
_AT_ONCE = 50_000_000


def text_hash(document: str) -> bytes:
    """Return 16 bytes that tell a text from others."""
    return blake2b(document.encode(), digest_size=_HASH_BYTES).digest()


def hashes_file(place: Place, unit: Unit) -> Path:
    """Return where a unit's hashes are."""
    return place.work / "hashes" / f"{unit.name}.npy"


def write_hashes(place: Place, unit: Unit, hashes: Sequence[bytes]) -> Path:
    """Store the hashes of a unit's documents in their order; return the file."""
    return _save(hashes_file(place, unit), np.frombuffer(b"".join(hashes), _HASH))


def find_duplicates(place: Place, units: Sequence[Unit]) -> None:
    """Store, for each unit, which of its documents are left out; all units' hashes must be there.

    Documents of splits that share none of their text, as train and val of a corpus with splits of its own, are
    compared too: what is in an earlier unit is left out of a later one.
    """
    hashes = [np.load(hashes_file(place, unit), mmap_mode="r") for unit in units]
    dropped: list[list[np.ndarray]] = [[] for _ in units]
    parts = sum(map(len, hashes)) // _AT_ONCE + 1
    for part in range(parts):
        for number, documents in _repeated(hashes, part, parts):
            dropped[number].append(documents)
    for unit, found in zip(units, dropped, strict=True):
        _save(_dropped_file(place, unit), np.sort(np.concatenate([np.zeros(0, np.int64), *found])))


def dropped_documents(place: Place, unit: Unit) -> frozenset[int]:
    """Return the numbers of a unit's documents that are left out."""
    return frozenset(np.load(_dropped_file(place, unit)).tolist())


def _repeated(hashes: list[np.ndarray], part: int, parts: int) -> list[tuple[int, np.ndarray]]:
    """Return, by unit, the documents whose hash was there before, among the hashes of one part in `parts`."""
    own = [np.flatnonzero(each["high"] % parts == part) for each in hashes]
    values = np.concatenate([each[numbers] for each, numbers in zip(hashes, own, strict=True)])
    order = np.lexsort((values["low"], values["high"]))  # stable: equal ones stay in the order of the units
    same = values[order[1:]] == values[order[:-1]]
    repeated = np.sort(order[1:][same])
    borders = np.cumsum([len(numbers) for numbers in own])
    by_unit = np.searchsorted(borders, repeated, side="right")
    starts = borders - [len(numbers) for numbers in own]
    return [
        (number, own[number][repeated[by_unit == number] - starts[number]]) for number in np.unique(by_unit).tolist()
    ]


def _dropped_file(place: Place, unit: Unit) -> Path:
    return place.work / "dropped" / f"{unit.name}.npy"


def _save(path: Path, values: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}-{os.getpid()}.npy")
    np.save(temporary, values)
    os.replace(temporary, path)
    return path
