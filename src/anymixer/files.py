"""Writing files so that a reader finds the old content or the new, never half of one."""

import os
from pathlib import Path

from anymixer.errors import UserError


def check_folder(folder: Path, key: str) -> None:
    """Raise UserError, naming `key`, where no file could be written. Nothing is made: other mistakes may be found
    later."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"{key}: {there} is a file; name a folder")
    if not os.access(there, os.W_OK):
        raise UserError(f"{key}: {folder}: no permission to write to {there}")


def write_text_atomic(path: str | Path, text: str) -> None:
    """Replace the file at `path` by `text`; folders above it are made."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
