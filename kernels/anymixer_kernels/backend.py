"""Which implementation of an op runs.

`auto` (the default) is the fastest form for the input's device; `torch` is the fast pure-PyTorch form;
`reference` is the slow, literal one that defines what is correct.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

BACKENDS = ("auto", "torch", "reference")

_forced: ContextVar[str] = ContextVar("anymixer_kernels_backend", default="auto")


def current_backend() -> str:
    """The backend in force: one of `BACKENDS`."""
    return _forced.get()


@contextmanager
def force_backend(name: str) -> Iterator[None]:
    """Run every op inside the `with` block by backend `name`.

    Raises ValueError for a name that is not in `BACKENDS`.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown backend '{name}': choose one of {', '.join(BACKENDS)}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)
