"""Documents from files: one iterator per format, chosen by the file's name."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import TextIO

from anymixer.errors import UserError

SEPARATORS = ("blank", "line", "file")
_TEXT = (".txt", ".text", ".md")
_JSON_LINES = (".jsonl", ".ndjson")
_COMPRESSED = (".gz", ".xz", ".zst")
SUPPORTED = ".txt, .jsonl (each also with .gz, .xz or .zst), .parquet"


def read_documents(paths: Iterable[Path], *, separator: str = "blank", column: str = "text") -> Iterator[str]:
    """Yield the documents of files, in order; empty ones are left out.

    Args:
        separator: what ends a document of a text file: a "blank" line, each "line", or the "file".
        column: field of JSON lines and Parquet files that holds the text.

    Raises:
        UserError: a file that is missing, damaged, of an unknown kind or without the column.
    """
    for path in paths:
        yield from (document for document in _documents(path, separator, column) if document)


def check_inputs(paths: Iterable[Path]) -> None:
    """Raise UserError for a file that is missing or of an unknown kind, before anything is read."""
    for path in paths:
        if not path.is_file():
            raise UserError(f"--input: no such file: {path}")
        if _kind(path) not in (*_TEXT, *_JSON_LINES, ".parquet"):
            raise UserError(f"--input: {path}: unknown kind of file; known: {SUPPORTED}")


def limited(documents: Iterable[str], *, max_docs: int | None, max_bytes: int | None) -> Iterator[str]:
    """Yield documents until there are `max_docs`, or their text has `max_bytes` bytes of UTF-8."""
    size = 0
    for number, document in enumerate(documents):
        if (max_docs is not None and number >= max_docs) or (max_bytes is not None and size >= max_bytes):
            return
        yield document
        size += len(document.encode())


def _kind(path: Path) -> str:
    """Return the suffix that names the format, below a compression's."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() in _COMPRESSED else path.suffix.lower()


def _documents(path: Path, separator: str, column: str) -> Iterator[str]:
    try:
        if _kind(path) == ".parquet":
            yield from _parquet(path, column)
            return
        with _open_text(path) as lines:
            yield from (_json_lines(lines, path, column) if _kind(path) in _JSON_LINES else _text(lines, separator))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start} of a block)") from error
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


@contextmanager
def _open_text(path: Path) -> Iterator[TextIO]:
    suffix = path.suffix.lower()
    if suffix == ".zst":
        import pyarrow

        # Arrow's reader, unlike that of the zstandard package, notices when the end of the file is missing.
        with pyarrow.input_stream(path, compression="zstd") as file:
            yield TextIOWrapper(file, encoding="utf-8")
        return
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(suffix, open)
    with opener(path, "rt", encoding="utf-8") as file:
        yield file


def _text(lines: Iterable[str], separator: str) -> Iterator[str]:
    document: list[str] = []
    for line in lines:
        if separator != "file" and not line.strip():
            yield "".join(document).strip()
            document = []
        elif separator == "line":
            yield line.strip()
        else:
            document.append(line)
    yield "".join(document).strip()


def _json_lines(lines: Iterable[str], path: Path, column: str) -> Iterator[str]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}: line {number} is not JSON ({error})") from error
        if not isinstance(record, dict) or not isinstance(record.get(column), str):
            fields = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise UserError(f"{path}: line {number} has no text field '{column}' (it has: {fields}); see --text_column")
        yield record[column].strip()


def _parquet(path: Path, column: str) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise UserError(f"{path}: no column '{column}' (it has: {', '.join(names)}); see --text_column")
            for batch in file.iter_batches(batch_size=1024, columns=[column]):
                for value in batch.column(0).to_pylist():
                    yield str(value or "").strip()
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: cannot be read as Parquet ({error})") from error
