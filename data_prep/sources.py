"""Documents from files: one reader per format, chosen by the file's name."""

from __future__ import annotations

import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from anymixer.errors import UserError

SEPARATORS = ("blank", "line", "file")
_TEXT = (".txt", ".text", ".md")
_JSON_LINES = (".jsonl", ".ndjson", ".json")
_COMPRESSED = (".gz", ".xz", ".zst")
SUPPORTED = ".txt, .jsonl or .json with an object a line (each also with .gz, .xz or .zst), .parquet"


@dataclass
class Meter:
    """How far a reader has come: `position()` in bytes of the file as it lies on the disk."""

    position: Callable[[], int] = int


@dataclass(frozen=True)
class TextFormat:
    """How documents lie in a file.

    Args:
        separator: what ends a document of a text file: a "blank" line, each "line", or the "file".
        column: field of JSON lines and Parquet files that holds the text.
    """

    separator: str = "blank"
    column: str = "text"


def read_file(
    path: Path, form: TextFormat, *, begin: int = 0, end: int | None = None, meter: Meter | None = None
) -> Iterator[str]:
    """Yield the documents of a file, or of a range of its bytes, in order; empty ones and nulls are left out.

    Ranges that cover a file one after the other give every document of it exactly once, wherever they begin.

    Args:
        begin, end: only for files that `is_divisible`.
        meter: told how far reading has come.

    Raises:
        UserError: a file that is missing, damaged, of an unknown kind, without the column or with no text in it.
    """
    meter = meter or Meter()
    try:
        if _kind(path) == ".parquet":
            documents = _parquet(path, form.column, meter)
        else:
            documents = _documents(path, form, begin, end, meter)
        yield from (document for document in documents if document)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason})") from error
    except (OSError, EOFError, lzma.LZMAError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from error


def is_divisible(path: Path, form: TextFormat) -> bool:
    """Tell whether a range of the file's bytes can be read without what is before it."""
    return _kind(path) in _JSON_LINES + _TEXT and path.suffix.lower() not in _COMPRESSED and form.separator != "file"


def input_files(given: Iterable[Path]) -> list[Path]:
    """Return the files among the given files and folders, those of a folder by name.

    Raises:
        UserError: one is missing, of an unknown kind, given twice, or a folder without any of a known kind.
    """
    files: dict[Path, Path] = {}  # by where they really are
    for path in map(Path.expanduser, given):
        found = sorted(file for file in path.rglob("*") if _is_known(file)) if path.is_dir() else [path]
        if not found:
            raise UserError(f"--input: {path}: no file of a known kind in it; known: {SUPPORTED}")
        if not found[0].is_file():
            raise UserError(f"--input: no such file: {path}")
        if not _is_known(found[0]):
            raise UserError(f"--input: {path}: unknown kind of file; known: {SUPPORTED}")
        for file in found:
            place = file.resolve()
            if other := files.get(place):
                raise UserError(f"--input: {file} is given twice" + (f" (as {other} too)" if other != file else ""))
            files[place] = file
    return list(files.values())


def limited(documents: Iterable[str], *, max_docs: int | None, max_bytes: int | None) -> Iterator[str]:
    """Yield documents until there are `max_docs`, or their text has `max_bytes` bytes of UTF-8."""
    if max_docs is None and max_bytes is None:
        yield from documents
        return
    size = 0
    for number, document in enumerate(documents):
        if (max_docs is not None and number >= max_docs) or (max_bytes is not None and size >= max_bytes):
            return
        yield document
        size += len(document.encode())


def _is_known(path: Path) -> bool:
    return path.is_file() and _kind(path) in (*_TEXT, *_JSON_LINES, ".parquet")


def _kind(path: Path) -> str:
    """Return the suffix that names the format, below a compression's."""
    return Path(path.stem).suffix.lower() if path.suffix.lower() in _COMPRESSED else path.suffix.lower()


def _documents(path: Path, form: TextFormat, begin: int, end: int | None, meter: Meter) -> Iterator[str]:
    with _opened(path, meter) as file:
        if begin:
            # Whatever the byte before the range belongs to, its line is of the range before.
            file.seek(begin - 1)
            begin += len(file.readline()) - 1
        lines = _lines(file, begin)
        if _kind(path) in _JSON_LINES:
            yield from _json_lines(lines, path, form.column, end)
        elif form.separator == "blank":
            yield from _between_blank_lines(lines, end, inside=begin == 0)
        elif form.separator == "line":
            yield from _each_line(lines, end)
        else:
            yield _text([line for _, line in lines])


@contextmanager
def _opened(path: Path, meter: Meter) -> Iterator[IO[bytes]]:
    """Open a file for its lines, decompressed."""
    with open(path, "rb") as raw:
        meter.position = raw.tell
        try:
            with _decompressed(raw, path.suffix.lower()) as file:
                yield file
        finally:
            size = path.stat().st_size
            meter.position = lambda: size


def _decompressed(raw: IO[bytes], suffix: str) -> IO[bytes]:
    if suffix == ".zst":
        import pyarrow

        # Arrow's reader, unlike that of the zstandard package, notices when the end of the file is missing.
        return io.BufferedReader(cast(Any, pyarrow.input_stream(raw, compression="zstd")), 1 << 20)
    if suffix == ".gz":
        return cast(IO[bytes], gzip.GzipFile(fileobj=raw))
    return cast(IO[bytes], lzma.LZMAFile(raw)) if suffix == ".xz" else raw


def _lines(file: IO[bytes], begin: int) -> Iterator[tuple[int, bytes]]:
    """Yield each line with the place where it begins."""
    for line in file:
        yield begin, line
        begin += len(line)


def _between_blank_lines(lines: Iterator[tuple[int, bytes]], end: int | None, *, inside: bool) -> Iterator[str]:
    """Yield the documents that follow a blank line that begins before `end`, or, `inside` one, the first line."""
    document: list[bytes] = []
    for place, line in lines:
        if not line.isspace():
            if inside:
                document.append(line)
            continue
        yield _text(document)
        document, inside = [], True
        if end is not None and place >= end:
            return
    yield _text(document)


def _each_line(lines: Iterator[tuple[int, bytes]], end: int | None) -> Iterator[str]:
    for place, line in lines:
        if end is not None and place >= end:
            return
        yield line.decode().strip()


def _text(lines: list[bytes]) -> str:
    return b"".join(lines).decode().replace("\r\n", "\n").strip()


def _json_lines(lines: Iterator[tuple[int, bytes]], path: Path, column: str, end: int | None) -> Iterator[str]:
    beginning = None
    for number, (place, line) in enumerate(lines, start=1):
        if end is not None and place >= end:
            return
        beginning = place if beginning is None else beginning
        if line.isspace():
            continue
        try:
            record = json.loads(line)
        except UnicodeDecodeError:
            raise
        except ValueError as error:
            raise UserError(f"{path}: {_line(number, beginning)} is not JSON ({error})") from error
        where = f"{path}: {_line(number, beginning)}"
        if not isinstance(record, dict):
            raise UserError(f"{where} is {_json_type(record)}, not an object with a field '{column}'")
        if column not in record:
            raise UserError(f"{where} has no field '{column}' (it has: {', '.join(record)}); see --text_column")
        text = record[column]
        if not isinstance(text, str | None):
            raise UserError(f"{where}: '{column}' is {_json_type(text)}, not text; see --text_column")
        yield (text or "").strip()


def _json_type(value: Any) -> str:
    names = {str: "text", bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), "null")


def _line(number: int, beginning: int) -> str:
    return f"line {number}" + (f" from byte {beginning} on" if beginning else "")


def _parquet(path: Path, column: str, meter: Meter) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    size, done = path.stat().st_size, 0
    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise UserError(f"{path}: no column '{column}' (it has: {', '.join(names)}); see --text_column")
            rows = max(file.metadata.num_rows, 1)
            for batch in file.iter_batches(batch_size=1024, columns=[column], use_threads=False):
                for value in batch.column(0).to_pylist():
                    if not isinstance(value, str | None):
                        kind = file.schema_arrow.field(column).type
                        raise UserError(f"{path}: column '{column}' holds {kind}, not text; see --text_column")
                    yield (value or "").strip()
                done += batch.num_rows
                meter.position = lambda place=size * done // rows: place
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: cannot be read as Parquet ({error})") from error
