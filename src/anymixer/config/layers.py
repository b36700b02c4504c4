"""The layers of one configuration: the file, the files it inherits, the command line; and their merging."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anymixer.config.read import COMMAND_LINE, read_overrides, read_yaml
from anymixer.errors import UserError

INHERITS = "inherits"


@dataclass(frozen=True)
class Layer:
    """Plain nested values and where they come from: a file's path, or "command line"."""

    source: str
    values: dict[str, Any]


def file_layers(path: Path) -> list[Layer]:
    """Return the layers of a file, weakest first: what it inherits (recursively, in order), then itself.

    Raises UserError when a file cannot be read or inherits itself.
    """
    return _file_layers(path, named_by=None, open_files=())


def override_layer(overrides: Sequence[str], files: Sequence[Layer], by_name: frozenset[str]) -> Layer:
    """Return the command line's `key.sub=value` as one layer; the last one wins when a key comes twice.

    Raises UserError where a key leads through a list or a single value: merging would drop what is there.
    """
    layer = Layer(COMMAND_LINE, {})
    for key, nested in read_overrides(overrides):
        if key == INHERITS:
            raise UserError(f"{COMMAND_LINE}: {INHERITS}: only a file inherits; write it in a YAML file")
        _refuse_path_through_value(key, [*files, layer], by_name)
        layer = Layer(COMMAND_LINE, _merged(layer.values, nested, "", by_name))
    return layer


def merge(layers: Iterable[Layer], by_name: frozenset[str] = frozenset()) -> dict[str, Any]:
    """Merge layers, weakest first: mappings key by key, anything else (lists too) replaced by the stronger.

    by_name: key paths of mappings replaced as a whole when the stronger one has another `name`; a plain
        text there counts as the name alone.
    """
    values: dict[str, Any] = {}
    for layer in layers:
        values = _merged(values, layer.values, "", by_name)
    return values


def cleared(values: Mapping[str, Any], sections: Iterable[str]) -> dict[str, Any]:
    """Return `values` without the false entries of top-level `sections`, and an empty section for null."""
    result = dict(values)
    for section in sections:
        entries = result.get(section, {})
        if entries is None or isinstance(entries, Mapping):
            result[section] = {name: entry for name, entry in (entries or {}).items() if entry is not False}
    return result


def lookup(values: Mapping[str, Any], key: str) -> Any:
    """Return the value at a dotted key path of nested mappings, or None where there is none."""
    found: Any = values
    for part in key.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return None
        found = found[part]
    return found


def source_of(key: str, layers: Sequence[Layer]) -> str:
    """Return which layer decides `key`: the strongest that sets it, else the last file, where it belongs."""
    parts = key.partition("[")[0].split(".")
    for layer in reversed(layers):
        if _decides(layer.values, parts):
            return layer.source
    return next(layer.source for layer in reversed(layers) if layer.source != COMMAND_LINE)


def _decides(values: Any, parts: list[str]) -> bool:
    """Whether `values` set the key path, be it to null, or set one value (or null) where it would begin."""
    if not parts or not isinstance(values, Mapping):
        return True
    return parts[0] in values and _decides(values[parts[0]], parts[1:])


def _file_layers(path: Path, named_by: str | None, open_files: tuple[Path, ...]) -> list[Layer]:
    if path.resolve() in [opened.resolve() for opened in open_files]:
        chain = " -> ".join(str(opened) for opened in (*open_files, path))
        raise UserError(f"{open_files[-1]}: {INHERITS}: a file inherits itself: {chain}")
    values = read_yaml(path, named_by)
    layers: list[Layer] = []
    for parent in _parents(path, values.pop(INHERITS, [])):
        layers += _file_layers(parent, f"{path}: {INHERITS}", (*open_files, path))
    return [*layers, Layer(str(path), values)]


def _parents(path: Path, inherits: Any) -> list[Path]:
    names = [inherits] if isinstance(inherits, str) else inherits
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{path}: {INHERITS}: expected a file name or a list of them, relative to this file")
    return [_shortened(path.parent / name) for name in names]


def _shortened(path: Path) -> Path:
    """Return `path` without its `..` where that names the same file (links may make it another)."""
    short = Path(os.path.normpath(path))
    return short if short.resolve() == path.resolve() else path


def _refuse_path_through_value(key: str, layers: Sequence[Layer], by_name: frozenset[str]) -> None:
    values = merge(layers, by_name)
    parts = key.split(".")
    for section in (".".join(parts[:end]) for end in range(1, len(parts))):
        held = lookup(values, section)
        is_name = isinstance(held, str) and section in by_name
        if held is not None and not isinstance(held, Mapping) and not is_name:
            kind = "a list" if isinstance(held, list) else "one value"
            where = source_of(section, layers)
            raise UserError(f"{COMMAND_LINE}: {key}: {section} is {kind} in {where}; override {section} as a whole")


def _merged(below: Mapping[str, Any], above: Mapping[str, Any], path: str, by_name: frozenset[str]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        here = f"{path}.{key}" if path else str(key)
        held = result.get(key)
        if here in by_name and isinstance(held, str):
            held = {"name": held}
        if isinstance(held, Mapping) and isinstance(value, Mapping):
            replaced = here in by_name and _names_another(held, value)
            result[key] = value if replaced else _merged(held, value, here, by_name)
        else:
            result[key] = value
    return result


def _names_another(held: Mapping[str, Any], value: Mapping[str, Any]) -> bool:
    return "name" in value and "name" in held and value["name"] != held["name"]
