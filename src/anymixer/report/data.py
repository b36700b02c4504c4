"""What a folder of shards holds: how full its rows are, how long its documents, and a picture of some rows.

anymixer report data data/wiki
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from anymixer.data import read_manifest
from anymixer.data.shards import INDEX_NAME, REDO, read_index
from anymixer.errors import UserError
from anymixer.files import write_text_atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.table import Table

# Rows measured of each split, spread over its shards: enough for every figure below, in seconds.
_MEASURED_ROWS = 20_000
_DRAWN_ROWS = 40
_PERCENTILES = (5, 25, 50, 75, 95)
PICTURE_NAME, TABLE_NAME = "rows.png", "data.json"


@dataclass(frozen=True)
class RowSizes:
    """The rows measured of a split.

    lengths: for each row, the lengths of its sequences; in tokens, or in characters for rows of text.
    capacity: positions of a row, None for text. rows: of the whole split.
    """

    split: str
    rows: int
    capacity: int | None
    lengths: list[NDArray[np.int64]]

    @property
    def real_share(self) -> float | None:
        """The share of the positions that hold a token of a sequence."""
        if self.capacity is None:
            return None
        return float(sum(int(row.sum()) for row in self.lengths) / (self.capacity * len(self.lengths)))


def report_data(folder: Path, output: Path | None = None) -> None:
    """Print what the splits of a data folder hold, and save it as JSON and a picture.

    Args:
        folder: with `train` and `val` in it, as data_prep leaves it; or one split.
        output: folder for the report; by default `runs/data/NAME`.

    Raises:
        UserError: there are no shards in the folder, or they cannot be read.
    """
    from rich.console import Console

    folder = folder.expanduser()
    output = Path("runs", "data", folder.resolve().name) if output is None else output
    manifest = read_manifest(folder) or {}
    places = [path.parent for path in sorted(folder.glob(f"*/{INDEX_NAME}"))] or [folder]
    splits = [measure(place, manifest, folder) for place in places]
    made = manifest.get("splits", {})
    facts = {sizes.split: summary(sizes) | {"converted": made.get(sizes.split)} for sizes in splits}
    Console().print(_table(folder, facts))
    for split, counts in made.items():
        print(f"{split}: {_documents(counts)}")
    write_text_atomic(output / TABLE_NAME, json.dumps(facts, indent=2) + "\n")
    print(output / TABLE_NAME)
    drawn = [sizes for sizes in splits if sizes.capacity is not None]
    if drawn:
        draw(drawn, output / PICTURE_NAME)
        print(output / PICTURE_NAME)


def measure(place: Path, manifest: dict[str, Any], folder: Path) -> RowSizes:
    """Measure rows of one split, spread evenly over it.

    folder: the data folder, whose tokenizer says which token ends a document of concatenated rows.
    """
    shards = read_index(place)
    columns, rows = shards[0].columns, sum(shard.samples for shard in shards)
    if "text" not in columns and "tokens" not in columns:
        raise UserError(f"{place}: columns {', '.join(columns)}; need 'text' or 'tokens'")
    wanted = np.unique(np.linspace(0, rows - 1, min(rows, _MEASURED_ROWS)).astype(np.int64))
    end = _end_token(folder) if "lengths" not in columns and "text" not in columns else None
    lengths = [_sequence_lengths(sample, end) for sample in read_rows(place, wanted)]
    capacity = None if "text" in columns else manifest.get("max_seq_len") or max(int(row.sum()) for row in lengths)
    return RowSizes(place.name, rows, capacity, lengths)


def read_rows(place: Path, wanted: NDArray[np.int64]) -> Iterator[dict[str, Any]]:
    """Yield the samples with these numbers, ascending; compressed shards are decompressed elsewhere."""
    from streaming.base.compression import decompress
    from streaming.base.format import reader_from_json

    entries = json.loads((place / INDEX_NAME).read_text())["shards"]
    begin = 0
    for entry in entries:
        inside = wanted[(wanted >= begin) & (wanted < begin + entry["samples"])] - begin
        begin += entry["samples"]
        if not len(inside):
            continue
        raw, zipped = place / entry["raw_data"]["basename"], entry.get("zip_data")
        try:
            with tempfile.TemporaryDirectory() as folder:
                if zipped and not raw.is_file():
                    data = decompress(entry["compression"], (place / zipped["basename"]).read_bytes())
                    copy = Path(folder, entry["raw_data"]["basename"])
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    copy.write_bytes(data)
                reader = reader_from_json(str(place) if raw.is_file() else folder, None, entry)
                for number in inside:
                    yield reader[int(number)]
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"{raw}: the shard cannot be read ({error}); {REDO}") from error


def summary(sizes: RowSizes) -> dict[str, Any]:
    """Return the figures of a split as plain data."""
    every = np.concatenate(sizes.lengths)
    return {
        "rows": sizes.rows,
        "rows_measured": len(sizes.lengths),
        "row_length": sizes.capacity,
        "real_share": sizes.real_share,
        "sequences_per_row": float(np.mean([len(row) for row in sizes.lengths])),
        "sequence_length": {
            "unit": "characters" if sizes.capacity is None else "tokens",
            "mean": float(every.mean()),
            **{f"p{p}": int(np.percentile(every, p)) for p in _PERCENTILES},
            "longest": int(every.max()),
        },
    }


def draw(splits: list[RowSizes], path: Path) -> None:
    """Save a picture: some rows with their sequences in turns of colour, and how long the sequences are."""
    from matplotlib.figure import Figure

    from anymixer.report.figures import save_figure

    figure = Figure(figsize=(12, 4.6 * len(splits)), layout="constrained")
    for axes, sizes in zip(figure.subplots(len(splits), 2, width_ratios=(2.2, 1), squeeze=False), splits, strict=True):
        _draw_rows(axes[0], sizes)
        _draw_lengths(axes[1], sizes)
    save_figure(figure, path)


def _draw_rows(axes: Axes, sizes: RowSizes) -> None:
    from matplotlib import colormaps

    assert sizes.capacity is not None
    colours = colormaps["tab20"].colors  # pyright: ignore[reportAttributeAccessIssue]
    picked = np.linspace(0, len(sizes.lengths) - 1, min(_DRAWN_ROWS, len(sizes.lengths))).astype(int)
    drawn = 0
    for place, row in enumerate(picked):
        lengths = sizes.lengths[row]
        begins = np.cumsum(lengths) - lengths
        # Colours go on from row to row, so that the same place in two rows does not look like one sequence.
        shades = [colours[(drawn + n) % len(colours)] for n in range(len(lengths))]
        axes.barh([place] * len(lengths), lengths, left=begins, color=shades, height=0.82, edgecolor="white", lw=0.4)
        drawn += len(lengths)
    axes.axvline(sizes.capacity, color="black", lw=0.8)
    share = sizes.real_share or 0.0
    axes.set(
        xlim=(0, sizes.capacity * 1.005),
        ylim=(len(picked) - 0.4, -0.6),
        xlabel="position",
        ylabel=f"{len(picked)} of {sizes.rows:,} rows",
        title=f"{sizes.split}: {share:.2%} of the positions are real tokens",
    )
    axes.set_facecolor("0.9")  # padding
    axes.set_yticks([])
    axes.spines[["top", "right", "left"]].set_visible(False)


def _draw_lengths(axes: Axes, sizes: RowSizes) -> None:
    every = np.concatenate(sizes.lengths)
    per_row = len(every) / len(sizes.lengths)
    axes.hist(every, bins=32, weights=every / every.sum(), color="tab:blue", edgecolor="white", lw=0.3)
    axes.set(
        xlabel="tokens in a sequence",
        ylabel="share of all tokens",
        title=f"{per_row:.2f} sequences a row, median {int(np.median(every))} tokens",
    )
    axes.spines[["top", "right"]].set_visible(False)


def _documents(counts: dict[str, Any]) -> str:
    """Say what the manifest counted when the data was made."""
    documents, tokens = counts["documents"], counts.get("document_tokens")
    mean = f", {tokens / documents:,.0f} tokens each in the mean" if tokens and documents else ""
    cut = f", {counts['cut']:,} of them cut" if counts.get("cut") else ""
    return f"{documents:,} documents{mean}{cut}"


def _sequence_lengths(sample: dict[str, Any], end: int | None) -> NDArray[np.int64]:
    if "text" in sample:
        return np.array([len(sample["text"])], np.int64)
    if "lengths" in sample:
        return sample["lengths"].astype(np.int64)
    tokens = sample["tokens"]
    total = len(tokens) // 8 if isinstance(tokens, bytes) else len(tokens)
    ends = [] if end is None or isinstance(tokens, bytes) else np.flatnonzero(tokens == end) + 1
    return np.diff(np.unique([0, *ends, total]))


def _end_token(folder: Path) -> int | None:
    """Return the token that ends the documents of concatenated rows, where the folder has its tokenizer."""
    from anymixer.data import load_tokenizer

    if not (folder / "tokenizer").is_dir():
        return None
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    found = tokenizer.sep_token_id if tokenizer.sep_token_id is not None else tokenizer.eos_token_id
    return found if isinstance(found, int) else None


def _table(folder: Path, facts: dict[str, dict[str, Any]]) -> Table:
    from rich.table import Table

    table = Table(title=f"{folder}: rows, their sequences, and the lengths of those", title_justify="left")
    unit = next(iter(facts.values()))["sequence_length"]["unit"]
    for column in ("split", "rows", "length", "real", "per row", unit, "5 to 95 %", "longest"):
        table.add_column(column, justify="left" if column == "split" else "right")
    for split, fact in facts.items():
        length = fact["sequence_length"]
        table.add_row(
            split,
            f"{fact['rows']:,}",
            "-" if fact["row_length"] is None else f"{fact['row_length']:,}",
            "-" if fact["real_share"] is None else f"{fact['real_share']:.2%}",
            f"{fact['sequences_per_row']:.2f}",
            f"{length['mean']:,.1f}",
            f"{length['p5']:,} - {length['p95']:,}",
            f"{length['longest']:,}",
        )
    return table
