"""Parameter names of other projects as ours, by a table of patterns."""

import re
from collections.abc import Iterable, Mapping

from torch import Tensor

_SHOWN = 5


class UnknownNames(KeyError):
    """Names that a table does not have; args[0] says which, in one line."""


def rename(state: Mapping[str, Tensor], table: Iterable[tuple[str, str]], what: str) -> dict[str, Tensor]:
    """The tensors under the names that the first matching pattern of `table` (whole name -> new name) gives.

    Raises UnknownNames, which lists the names that no pattern matches; `what` says what they are no parameters of.
    """
    table, renamed, unknown = list(table), {}, []
    for name, value in state.items():
        match = next(((p, r) for p, r in table if re.fullmatch(p, name)), None)
        if match is None:
            unknown.append(name)
        else:
            renamed[re.sub(*match, name)] = value
    if unknown:
        more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
        raise UnknownNames(f"not a parameter of {what}: {', '.join(unknown[:_SHOWN])}{more}")
    return renamed
