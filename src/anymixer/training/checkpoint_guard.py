"""Nothing but tensors and harmless types is read from a checkpoint, wherever Composer opens one.

Composer unpickles whatever a checkpoint holds, and evaluates the text that stands for each of its algorithms. It
offers a hook, called with every file before it is opened (and after it was fetched, where it is remote): the
environment variable that `install` sets.
"""

import ast
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from anymixer.errors import UserError
from anymixer.models.checkpoint_shards import METADATA, read_index, read_objects
from anymixer.models.checkpoint_weights import RefusedCheckpoint, read_checkpoint

HOOK = "CHECKPOINT_VALIDATION_FUNCTION"
_ARCHIVES = (".tar", ".tgz", ".gz", ".bz2", ".lzma", ".lz4", ".zst", ".xz", ".zip")


def install() -> None:
    """Have Composer call `is_harmless` for every checkpoint file of this process.

    Raises UserError where another such function is set: only one can be.
    """
    ours = f"{__name__}.{is_harmless.__name__}"
    if os.environ.get(HOOK, ours) != ours:
        raise UserError(f"{HOOK}: set to {os.environ[HOOK]}, but anymixer checks checkpoints itself; unset it")
    os.environ[HOOK] = ours


def is_harmless(path: str | Path, segments: list[tuple[int, int]] | None = None) -> bool:
    """Composer's hook: True, or RefusedCheckpoint, or UserError for a broken file.

    path: a checkpoint, an index of shards or a shard; segments: (offset, length) of what Composer will read of a shard.
    """
    path = Path(path)
    if path.name == METADATA:
        read_index(path.parent, "checkpoint")
    elif segments is not None:
        objects = read_objects(path.parent, read_index(path.parent, "checkpoint"), "checkpoint", path.name)
        _check_algorithms(objects, "checkpoint", path)
    else:
        check_harmless(path, "checkpoint")
    return True


def check_harmless(path: Path, key: str) -> None:
    """Read a checkpoint, a file or a folder of shards, as far as to know that loading it runs no code of its own.

    A file's tensors are left on disk. Raises RefusedCheckpoint naming `key`, or UserError for a broken checkpoint.
    """
    if path.is_dir():
        _check_algorithms(read_objects(path, read_index(path, key), key), key, path)
        return
    state = read_checkpoint(path, key, mmap=True).get("state")
    if isinstance(state, dict):
        _check_algorithms({"state.algorithms": state.get("algorithms")}, key, path)


def check_name(name: str, key: str) -> None:
    """Raise UserError for an archive, which Composer would unpack before anything can be checked."""
    if name.endswith(_ARCHIVES):
        raise UserError(f"{key}: {name} is an archive; unpack it and name the checkpoint inside")


def _check_algorithms(objects: dict[str, Any], key: str, path: Path) -> None:
    for name, value in objects.items():
        if name.startswith("state.algorithms"):
            for text in _representations(value, name.rpartition(".")[2]):
                if not isinstance(text, str) or not _is_plain_call(text):
                    raise RefusedCheckpoint(f"{key}: {path} is refused: an algorithm of it is code: {text!r:.80}")


def _representations(value: Any, name: Any) -> Iterator[Any]:
    """What stands under the name `repr`, however deep: Composer evaluates it."""
    if name == "repr":
        yield value
    elif isinstance(value, dict):
        for part, inner in value.items():
            yield from _representations(inner, part)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _representations(inner, None)


def _is_plain_call(text: str) -> bool:
    """Whether evaluating `algorithms.` + text makes an algorithm of plain values, or fails."""
    try:
        call = ast.parse(f"algorithms.{text}", mode="eval").body
    except (SyntaxError, ValueError):
        return True
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
        return False
    return isinstance(call.func.value, ast.Name) and all(
        _is_plain(argument) for argument in [*call.args, *(keyword.value for keyword in call.keywords)]
    )


def _is_plain(node: ast.expr) -> bool:
    """Whether an argument is a literal, a name or a member of Composer's Event (`apply_at=Event.INIT`)."""
    if isinstance(node, ast.Attribute):
        return isinstance(node.value, ast.Name) and node.value.id == "Event"
    if isinstance(node, ast.Name):
        return True
    try:
        ast.literal_eval(node)
    except (ValueError, TypeError):
        return False
    return True
