"""Errors that are the user's to fix: shown as one line, exit code 2, never a stack trace."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake in a key, file or option; the message is one line that names it and says what to do."""


def suggest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the known name closest to `name`, or "" when none is close."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""
