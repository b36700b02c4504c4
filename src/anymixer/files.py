"""Writing files so that a reader finds the old content or the new, never half of one."""

import os
from pathlib import Path


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
