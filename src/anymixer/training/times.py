"""Composer's time strings ("500ba", "1ep", "0.06dur"), checked without importing Composer.

Units: ep epochs, ba batches (optimizer steps), sp sequences, tok tokens, dur share of the training.
"""

import re
from typing import NamedTuple

from anymixer.errors import UserError

EXAMPLES = {"ep": "1ep", "ba": "1000ba", "sp": "100000sp", "tok": "10000000tok", "dur": "0.06dur"}
UNITS = tuple(EXAMPLES)
_TIME = re.compile(r"(?P<value>\d+(?:\.\d*)?(?:e\d+)?|\.\d+)(?P<unit>ep|ba|sp|tok|dur)", re.IGNORECASE)


def parse_time(text: str, key: str, units: tuple[str, ...] = UNITS) -> tuple[float, str]:
    """Split a time string into its value and unit.

    A whole number without a unit is a number of epochs where epochs are allowed, as in Composer.
    Raises UserError, naming `key`, when the text is no time in one of `units`.
    """
    text = str(text).strip()
    if text.isdecimal() and "ep" in units:
        text += "ep"
    match = _TIME.fullmatch(text)
    if match is None or match["unit"].lower() not in units:
        examples = ", ".join(EXAMPLES[unit] for unit in units)
        raise UserError(f"{key}: '{text}' is not a duration; write a number and its unit, such as {examples}")
    value, unit = float(match["value"]), match["unit"].lower()
    if unit == "dur" and value > 1:
        raise UserError(f"{key}: '{text}' is more than the whole training; a share is at most 1dur")
    if unit != "dur" and value != int(value):
        raise UserError(f"{key}: '{text}' must be a whole number of {unit}")
    return value, unit


def for_composer(text: str) -> str:
    """Return the time string as Composer reads it (a bare number of epochs gets its unit)."""
    text = str(text).strip()
    return f"{text}ep" if text.isdecimal() else text.lower()


class Length(NamedTuple):
    """A time, in one of UNITS but "dur"."""

    value: float
    unit: str


def length(text: str, max_duration: str, key: str) -> Length:
    """Return a time, a share of the training as that share of `max_duration`."""
    value, unit = parse_time(text, key)
    if unit == "dur":
        whole, unit = parse_time(max_duration, "max_duration")
        value *= whole
    return Length(value, unit)


def scheduler_unit(text: str, max_duration: str, key: str) -> str:
    """Return the unit Composer's schedulers count `text` in: shares follow max_duration, epochs become ba."""
    _, unit = parse_time(text, key)
    if unit == "dur":
        _, unit = parse_time(max_duration, "max_duration")
    return "ba" if unit == "ep" else unit
