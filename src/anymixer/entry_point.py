"""How every program of ours ends: a user's mistake is one line and exit code 2, a bug of ours a stack trace."""

import argparse
import errno
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from anymixer.errors import UserError


class ArgumentParser(argparse.ArgumentParser):
    """Python's, which takes what is wrong with a command line for a mistake like any other."""

    def error(self, message: str) -> NoReturn:
        """Raise UserError."""
        raise UserError(f"{self.prog}: {message} (see {self.prog} --help)")


def run(main: Callable[[list[str]], None], arguments: list[str]) -> int:
    """Call `main(arguments)` and return the exit code: 0, 2 for a UserError or a full disk, 130 for Ctrl-C."""
    try:
        main(arguments)
    except UserError as error:
        return _fail(str(error))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return _fail(f"the disk is full: {error.filename or error}")
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def _fail(message: str) -> int:
    # All ranks of a launch find the same mistake; one of them says so.
    if os.environ.get("RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr, flush=True)
    return 2
