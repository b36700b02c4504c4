"""Which implementation of an op runs.

`auto` (the default) is the fastest form for the input's device; `torch` is the fast pure-PyTorch form;
`reference` is the slow, literal one that defines what is correct.
"""

from collections.abc import Iterator
from contextlib import contextmanager

BACKENDS = ("auto", "torch", "reference")

# A plain global: torch.compile cannot trace through a context variable.
_forced = "auto"


def current_backend() -> str:
    """The backend in force: one of `BACKENDS`."""
    return _forced


@contextmanager
def force_backend(name: str) -> Iterator[None]:
    """Run every op inside the `with` block by backend `name`.

    Raises ValueError for a name that is not in `BACKENDS`.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown backend '{name}': choose one of {', '.join(BACKENDS)}")
    global _forced
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before
