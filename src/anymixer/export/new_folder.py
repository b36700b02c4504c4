"""A folder that is there when it is complete, and not before."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from anymixer.errors import UserError

# What a place can have against being written to.
_REASONS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `out` at the end and vanishes on any failure, with what was made above it.

    It lies beside `out`, in a hidden folder, and has its name: loading code depends on it. Raises UserError where `out`
    cannot be written or has appeared meanwhile.
    """
    from safetensors import SafetensorError

    missing = [folder for folder in out.parents if not folder.exists()]
    temporary = out.parent / f".{out.name}.partial-{os.getpid()}"
    try:
        try:
            (temporary / out.name).mkdir(parents=True)
        except OSError as error:
            raise UserError(f"{out}: cannot be made: {error.strerror}: {error.filename}") from error
        yield temporary / out.name
        if out.exists() or out.is_symlink():
            raise UserError(f"{out}: it appeared meanwhile, and is left as it is; name a folder that is not there")
        os.rename(temporary / out.name, out)
    except (OSError, RuntimeError) as error:
        if (reason := _reason(error)) is None:
            raise
        raise UserError(f"{out}: cannot be written: {reason}") from error
    except SafetensorError as error:
        raise UserError(f"{out}: cannot be written: {error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        for folder in missing:  # the lowest first; one that holds something stays
            with suppress(OSError):
                folder.rmdir()


def _reason(error: BaseException | None) -> str | None:
    """What a place has against being written to, which torch says in the context of another error."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _REASONS:
            return ": ".join(str(part) for part in (error.strerror, error.filename) if part)
        error = error.__context__
    return None
