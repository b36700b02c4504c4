"""Check plain values against the schema's dataclasses: unknown keys, refused keys, wrong types.

Each layer is checked alone, which is what lets an error name the file that holds the mistake; and once more
all together, when `${...}` is resolved.
"""

import dataclasses
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import cache
from typing import Any, TypeGuard, Union, get_args, get_origin, get_type_hints

from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from anymixer.errors import UserError, suggest

LISTED_AT_MOST = 12
"""Sections with no more keys than this are listed in full when an unknown key resembles none of them."""


def check_values(
    values: Mapping[str, Any],
    schema: type,
    source_of: Callable[[str], str],
    refused: Mapping[str, str] | None = None,
    clearable: Collection[str] = (),
    resolved: bool = False,
) -> None:
    """Raise UserError("source: key.path: problem") for the first key that is unknown, refused or ill-typed.

    schema: a dataclass. source_of: key path -> where it was written.
    refused, clearable: see ConfigSchema.REFUSED and CLEARABLE; the latter may be null, and their entries false,
        whatever their type.
    resolved: False lets values that hold `${...}` pass, because their type is not known yet.
    What lies under an untyped field (`Any`, `dict[str, Any]`) is checked by its owner later; here only its
    keys must be text.
    """
    _Check(schema, source_of, refused or {}, clearable, resolved).mapping(schema, values, "")


def known_keys(schema: type, prefix: str = "") -> Iterator[str]:
    """Yield the path of every key that the dataclass `schema` has, sections before what is in them."""
    for name, hint in _hints(schema).items():
        path = _join(prefix, name)
        yield path
        inner = _without_none(hint)
        if _is_section(inner):
            yield from known_keys(inner, path)


@dataclasses.dataclass(frozen=True)
class _Check:
    """The walk through one mapping of values; `schema` is the dataclass at its root."""

    schema: type
    source_of: Callable[[str], str]
    refused: Mapping[str, str]
    clearable: Collection[str]
    resolved: bool

    def mapping(self, schema: type, data: Mapping[Any, Any], path: str) -> None:
        hints = _hints(schema)
        for key, value in data.items():
            here = self.key(key, path)
            self.refuse(here, value)
            if key not in hints:
                raise self.error(here, f"unknown key{self.nearest(key, here, schema)}")
            self.value(hints[key], value, here)

    def key(self, key: Any, path: str) -> str:
        here = _join(path, str(key))
        if not isinstance(key, str):
            raise self.error(here, f"the key {key!r} is not text to YAML; put it in quotes")
        return here

    def refuse(self, path: str, value: Any) -> None:
        for pattern, reason in self.refused.items():
            key, _, refused_value = pattern.partition("=")
            if path.count(".") == key.count(".") and fnmatchcase(path, key):
                if not refused_value:
                    raise self.error(path, f"not supported: {reason}")
                if value == refused_value:
                    raise self.error(path, f"'{value}' is not supported: {reason}")

    def value(self, hint: Any, value: Any, path: str) -> None:
        if not self.resolved and isinstance(value, str) and ("${" in value or value == "???"):
            return
        inner = _without_none(hint)
        if value is None and (inner is not hint or hint is Any or path in self.clearable):
            return
        if value is False and path.rpartition(".")[0] in self.clearable:
            return
        if _is_section(inner):
            self.mapping(inner, self.expect(Mapping, hint, value, path), path)
        elif get_origin(inner) is dict:
            self.free_mapping(get_args(inner)[1], self.expect(Mapping, hint, value, path), path)
        elif get_origin(inner) in (list, tuple):
            self.sequence(inner, self.expect((list, tuple), hint, value, path), path)
        elif inner is Any:
            self.untyped(value, path)
        else:
            self.leaf(hint, value, path)

    def expect(self, kind: type | tuple[type, ...], hint: Any, value: Any, path: str) -> Any:
        if not isinstance(value, kind):
            raise self.wrong_type(hint, value, path)
        return value

    def free_mapping(self, hint: Any, data: Mapping[Any, Any], path: str) -> None:
        for key, value in data.items():
            here = self.key(key, path)
            self.refuse(here, value)
            self.value(hint, value, here)

    def sequence(self, hint: Any, values: Sequence[Any], path: str) -> None:
        items = get_args(hint)
        if get_origin(hint) is tuple and items[-1] is not Ellipsis:
            if len(values) != len(items):
                raise self.error(path, f"expected {_describe(hint)}, got {len(values)} items")
        else:
            items = (items[0],) * len(values)
        for index, (item, value) in enumerate(zip(items, values, strict=True)):
            self.value(item, value, f"{path}[{index}]")

    def untyped(self, value: Any, path: str) -> None:
        if isinstance(value, Mapping):
            self.free_mapping(Any, value, path)
        elif isinstance(value, list):
            self.sequence(list[Any], value, path)

    def leaf(self, hint: Any, value: Any, path: str) -> None:
        """Ask OmegaConf, whose conversions apply at the end, except where these would hide a mistake."""
        inner = _without_none(hint)
        # OmegaConf turns any number into a bool, and `no` or 1e5 (bool and float to YAML) into text.
        if (inner is bool and isinstance(value, (int, float)) and not isinstance(value, bool)) or (
            inner is str and isinstance(value, (bool, float))
        ):
            raise self.wrong_type(hint, value, path)
        # A `${` that is still there when all is resolved is text, but OmegaConf would not check its type.
        asked = value.replace("${", "{") if isinstance(value, str) else value
        try:
            DictConfig(content={"value": asked}, element_type=hint)
        except (OmegaConfBaseException, TypeError, ValueError):
            raise self.wrong_type(hint, value, path) from None

    def nearest(self, key: str, path: str, schema: type) -> str:
        """Return where the key may have been meant to go: a sibling, or a key of that name elsewhere."""
        siblings = list(_hints(schema))
        if near := suggest(key, siblings):
            return near
        elsewhere = [known for known in known_keys(self.schema) if known.rpartition(".")[2] == key]
        if elsewhere:
            top = path.partition(".")[0]
            return f"; did you mean '{next((k for k in elsewhere if k.startswith(top)), elsewhere[0])}'?"
        section = path.rpartition(".")[0] or "the top level"
        return f"; the keys of {section} are {', '.join(siblings)}" if len(siblings) <= LISTED_AT_MOST else ""

    def wrong_type(self, hint: Any, value: Any, path: str) -> UserError:
        quote = isinstance(value, (bool, float)) and _without_none(hint) is str
        return self.error(
            path, f"expected {_describe(hint)}, got {_shown(value)}{'; put it in quotes' if quote else ''}"
        )

    def error(self, path: str, problem: str) -> UserError:
        return UserError(f"{self.source_of(path)}: {path}: {problem}")


@cache
def _hints(schema: type) -> dict[str, Any]:
    hints = get_type_hints(schema)
    return {field.name: hints[field.name] for field in dataclasses.fields(schema)}


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _is_section(hint: Any) -> TypeGuard[type]:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def _is_union(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType)


def _without_none(hint: Any) -> Any:
    """Return X for `X | None`, and anything else (wider unions too) as it is."""
    if _is_union(hint):
        members = [member for member in get_args(hint) if member is not types.NoneType]
        if len(members) == 1:
            return members[0]
    return hint


_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    types.NoneType: "null",
}


def _describe(hint: Any) -> str:
    """Return a type in words a YAML author uses."""
    if _is_union(hint):
        return " or ".join(_describe(member) for member in get_args(hint))
    if _is_section(hint) or get_origin(hint) is dict:
        return "a mapping (key: value)"
    if get_origin(hint) is tuple and Ellipsis not in get_args(hint):
        return f"a list of {len(get_args(hint))} items"
    if get_origin(hint) in (list, tuple):
        return "a list"
    return _NAMES.get(hint, str(hint))


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "a mapping"
    return "a list" if isinstance(value, list) else repr(value)
