"""GLUE's data: from a local folder of parquet or original TSV files, or from the Hugging Face Hub.

A local folder holds one folder a task, under its lower-case name (`rte/train.parquet`, the Hub's
`rte/train-00000-of-00001.parquet`) or GLUE's own (`RTE/train.tsv`). A part of a split is named so:
`mnli/train_subset.parquet`.
"""

import csv
import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from anymixer.errors import UserError
from anymixer.glue.tasks import AX_TSV, Task, TsvLayout

HUB_NAME = "nyu-mll/glue"
# Of the original files: split -> name without the suffix.
_TSV_NAMES = {
    "train": ("train",),
    "validation": ("dev",),
    "validation_matched": ("dev_matched",),
    "validation_mismatched": ("dev_mismatched",),
    "test": ("test", "diagnostic", "AX"),
    "test_matched": ("test_matched",),
    "test_mismatched": ("test_mismatched",),
}


class SplitMissing(UserError):
    """A task's split is not there: a sweep can leave the task out, and say so in these words."""


@dataclass(frozen=True)
class Examples:
    """One split. texts: a list a column. labels: int64 classes or float32 scores [examples]; None for a test set.
    partial: whether the files say that they hold a part of the split. unreadable: lines that were left out."""

    texts: tuple[list[str], ...]
    labels: NDArray[Any] | None
    partial: bool = False
    unreadable: int = 0

    def __len__(self) -> int:
        return len(self.texts[0])


def check_data(task: Task, data_local: str | None) -> None:
    """Raise SplitMissing when the training split, or every validation split, of a task is not in the local folder."""
    if data_local is None:
        return
    if not Path(data_local).is_dir():
        raise UserError(f"data_local: no such folder: {data_local}")
    if not _files(data_local, task, "train"):
        raise SplitMissing(_missing_message(data_local, task, "train"))
    if not any(_files(data_local, task, split) for split in task.validation.values()):
        raise SplitMissing(_missing_message(data_local, task, next(iter(task.validation.values()))))


def data_digest(task: Task, data_local: str) -> str:
    """SHA-256 over the files that a local task is trained and scored on."""
    digest = hashlib.sha256()
    for split in ("train", *task.validation.values()):
        for path in _files(data_local, task, split):
            digest.update(f"{split} {path.name} {path.stat().st_size}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def load_split(
    task: Task, split: str, data_local: str | None, *, labelled: bool = True, other: str | None = None
) -> Examples:
    """Read one split.

    labelled: whether labels are wanted; a test set's are -1 and not read. other: the folder of another task's data
    ("ax") that this task's columns describe.

    Raises:
        SplitMissing: it is not there.
        UserError: a file that cannot be read, lacks a column, or has a label that the task does not know.
    """
    if data_local is None:
        return _from_hub(task, split, labelled, other)
    files = _files(data_local, task, split, other)
    if not files:
        raise SplitMissing(_missing_message(data_local, task, split, other))
    if files[0].suffix == ".parquet":
        return _from_parquet(task, files, labelled)
    return _from_tsv(task, files[0], labelled, AX_TSV if other else task.tsv, test=split.startswith("test"))


def _files(data_local: str, task: Task, split: str, other: str | None = None) -> list[Path]:
    """The split's files, parquet before TSV; empty where there are none."""
    layout = AX_TSV if other else task.tsv
    names = {name.lower() for name in (other or task.name, *(layout.folders if layout else ()))}
    folders = sorted(path for path in Path(data_local).iterdir() if path.is_dir() and path.name.lower() in names)
    pattern = re.compile(rf"{split}(_subset)?(-\d+-of-\d+)?\.parquet")
    for folder in folders:
        if found := sorted(path for path in folder.iterdir() if pattern.fullmatch(path.name)):
            return found
    for folder in folders:
        if found := [path for name in _TSV_NAMES.get(split, ()) if (path := folder / f"{name}.tsv").is_file()]:
            return found
    return []


def _missing_message(data_local: str, task: Task, split: str, other: str | None = None) -> str:
    layout = AX_TSV if other else task.tsv
    tsv = f" or {layout.folders[0]}/{_TSV_NAMES[split][0]}.tsv" if layout else ""
    name = other or task.name
    return f"{task.name}: no {split} split in {data_local} (looked for {name}/{split}.parquet{tsv})"


def _from_parquet(task: Task, files: Sequence[Path], labelled: bool) -> Examples:
    import pyarrow
    from pyarrow import parquet

    columns = [*task.texts, *(["label"] if labelled else [])]
    try:
        schema = parquet.read_schema(files[0])
        if absent := [name for name in columns if name not in schema.names]:
            raise UserError(f"{files[0]}: has no column '{absent[0]}', which {task.name} needs")
        table = pyarrow.concat_tables([parquet.read_table(path, columns=columns) for path in files])
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise UserError(f"{files[0]}: not a readable parquet file: {_one_line(error)}") from error
    texts = tuple(table[name].to_pylist() for name in task.texts)
    labels = _labels(task, table["label"].to_pylist(), files[0]) if labelled else None
    return Examples(texts, labels, partial=any("_subset" in path.name for path in files))


def _from_hub(task: Task, split: str, labelled: bool, other: str | None) -> Examples:
    import datasets
    from datasets.exceptions import DatasetsError

    try:
        rows = datasets.load_dataset(HUB_NAME, other or task.name, split=split)
    except (OSError, DatasetsError) as error:
        raise UserError(
            f"data_local: not set, and {HUB_NAME} cannot be fetched from the Hugging Face Hub "
            f"({_one_line(error)}); name a folder of parquet or TSV files"
        ) from error
    texts = tuple(list(rows[name]) for name in task.texts)
    return Examples(texts, _labels(task, list(rows["label"]), Path(HUB_NAME)) if labelled else None)


def _from_tsv(task: Task, path: Path, labelled: bool, layout: TsvLayout | None, *, test: bool) -> Examples:
    assert layout is not None
    columns = layout.test_columns if test and layout.test_columns else layout.columns
    wanted = [*columns, *([layout.label] if labelled else [])]
    found: list[list[str]] = [[] for _ in wanted]
    unreadable = 0
    for row in _tsv_rows(path, wanted):
        # A few lines of QQP's original files lack their last columns.
        if any(row.get(name) is None for name in wanted):
            unreadable += 1
            continue
        for values, name in zip(found, wanted):
            values.append(row[name])
    texts = tuple(found[: len(columns)])
    labels = _labels(task, found[-1], path) if labelled else None
    return Examples(texts, labels, unreadable=unreadable)


def _tsv_rows(path: Path, wanted: Sequence[str | int]) -> Iterator[Mapping[Any, Any]]:
    """The lines as column -> text; columns are numbers where those wanted are. Quotation marks are plain text."""
    with open(path, encoding="utf-8", newline="\n") as file:
        lines = csv.reader((line.rstrip("\r\n") for line in file), delimiter="\t", quoting=csv.QUOTE_NONE)
        names: list[Any] | None = None
        if isinstance(wanted[0], str):
            # Some files begin with a byte-order mark.
            names = [name.lstrip("\ufeff") for name in next(lines, [])]
            if absent := [name for name in wanted if name not in names]:
                raise UserError(f"{path}: has no column '{absent[0]}' (columns: {', '.join(names)})")
        for line in lines:
            yield dict(zip(names, line)) if names else dict(enumerate(line))


def _labels(task: Task, values: Sequence[Any], source: Path) -> NDArray[Any]:
    """Labels as numbers: scores of regression, else classes given by number or by name."""
    try:
        if task.regression:
            return np.array([float(value) for value in values], dtype=np.float32)
        number = {name: place for place, name in enumerate(task.labels)}
        labels = np.array([number[v] if v in number else int(v) for v in values], dtype=np.int64)
    except (TypeError, ValueError) as error:
        raise UserError(f"{source}: a label of {task.name} cannot be read: {_one_line(error)}") from error
    if wrong := set(labels.tolist()) - set(range(task.num_labels)):
        known = ", ".join(f"{place} {name}" for place, name in enumerate(task.labels))
        raise UserError(f"{source}: label {min(wrong)} is none of {task.name}'s ({known})")
    return labels


def _one_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
