"""Turns a plain mapping (from YAML or a Hugging Face config) into a typed options dataclass, or says what is wrong.

Below `config/` nothing knows omegaconf, because exported models would then demand it; this is the little that
is needed instead.
"""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from anymixer.errors import UserError, suggest

T = TypeVar("T")


def parse_options(cls: type[T], values: Mapping[str, Any], path: str) -> T:
    """Build dataclass `cls` from `values`.

    path: the key that holds `values`, for messages. Raises UserError for a key `cls` does not have and for a
    value of the wrong type (an int is a fine float; a list is a fine tuple).
    """
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}  # type: ignore[arg-type]
    hints = typing.get_type_hints(cls)
    parsed = {}
    for key, value in values.items():
        if key not in fields:
            known = ", ".join(sorted(fields)) or "it has no options"
            hint = suggest(str(key), fields) or f" (known: {known})"
            raise UserError(f"{path}.{key}: unknown key{hint}")
        parsed[key] = _convert(value, hints[key], f"{path}.{key}")
    required = [f.name for f in fields.values() if _is_required(f) and f.name not in parsed]
    if required:
        raise UserError(f"{path}.{required[0]}: missing; it has no default")
    return cls(**parsed)


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _convert(value: Any, hint: Any, path: str) -> Any:
    """`value` as type `hint` (plain types, Optional, unions, Literal, tuple, list, dict), or UserError at `path`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        return _convert_union(value, args, hint, path)
    if origin is typing.Literal:
        if value not in args:
            raise UserError(f"{path}: {value!r} is none of {', '.join(map(str, args))}{suggest(str(value), args)}")
        return value
    if origin is tuple and isinstance(value, (list, tuple)) and len(value) == len(args):
        return tuple(_convert(v, a, f"{path}[{i}]") for i, (v, a) in enumerate(zip(value, args)))
    if origin in (list, dict):
        hint = origin
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    name = hint.__name__ if isinstance(hint, type) else str(hint)
    raise UserError(f"{path}: {value!r} is not of type {name}")


def _convert_union(value: Any, args: tuple[Any, ...], hint: Any, path: str) -> Any:
    if value is None and type(None) in args:
        return None
    options = [a for a in args if a is not type(None)]
    for option in options:
        try:
            return _convert(value, option, path)
        except UserError:
            if len(options) == 1:
                raise
    raise UserError(f"{path}: {value!r} is not of type {hint}")
