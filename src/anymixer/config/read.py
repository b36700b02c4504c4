"""One layer of a configuration as plain Python values: a YAML file, or the command line's overrides.

YAML is read by OmegaConf's loader, so that 5e-4 and 1e-5 are numbers (plain YAML 1.1 makes them text).
`${...}` stays text here. Every error is one line with the file and, where there is one, the key or line.
"""

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from anymixer.errors import UserError, suggest

COMMAND_LINE = "command line"


def read_yaml(path: Path, named_by: str | None = None) -> dict[str, Any]:
    """Return the mapping in the YAML file `path`, with interpolations unresolved.

    named_by: what asked for the file ("x.yaml: inherits"), shown first when there is no such file.
    Raises UserError for anything but a UTF-8 YAML file that holds one mapping without duplicate keys.
    """
    text = _read_text(path, f"{named_by}: {path}" if named_by else str(path))
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is None:
            raise UserError(f"{path}: the file is empty; it needs `key: value` lines")
        if not isinstance(root, yaml.MappingNode):
            raise UserError(f"{path}: holds {_KIND[type(root)]} where `key: value` lines belong")
        _refuse_duplicates(root, str(path))
        return _plain(OmegaConf.load(io.StringIO(text)))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: {_yaml_problem(error)}") from None
    except OmegaConfBaseException as error:
        raise UserError(f"{path}: {_interpolation_problem(error)}") from None


def read_overrides(overrides: Sequence[str]) -> list[tuple[str, dict[str, Any]]]:
    """Return (key path, nested mapping) of each `key.sub=value`; values are YAML: 3, null, [1, 2], {a: 1}."""
    return [_read_override(item) for item in overrides]


def nest(key: str, value: Any) -> dict[str, Any]:
    """Return {"a": {"b": value}} for the key path "a.b"."""
    first, _, rest = key.partition(".")
    return {first: nest(rest, value) if rest else value}


def _read_override(item: str) -> tuple[str, dict[str, Any]]:
    key, equals, text = item.partition("=")
    key = key.strip()
    if not equals or not key:
        raise UserError(f"{COMMAND_LINE}: {item}: an override is written key.sub=value")
    if key.startswith("-"):
        raise UserError(f"{COMMAND_LINE}: {key}: overrides have no dashes; write {key.lstrip('-')}={text}")
    if "[" in key or not all(key.split(".")):
        raise UserError(
            f"{COMMAND_LINE}: {key}: not a key path such as optimizer.lr; a list is given whole, key=[1, 2]"
        )
    if not text.strip():
        raise UserError(f"{COMMAND_LINE}: {key}: no value after '='; write {key}=null to unset it")
    return key, nest(key, _parse_value(key, text))


def _parse_value(key: str, text: str) -> Any:
    try:
        return _plain(OmegaConf.from_dotlist([f"value={text}"]))["value"]
    except (yaml.YAMLError, OmegaConfBaseException):
        hint = "put text in quotes, and ${...} in quotes inside {} or []"
        raise UserError(f"{COMMAND_LINE}: {key}: cannot read {text!r} as a YAML value; {hint}") from None


def _plain(config: Any) -> Any:
    return OmegaConf.to_container(config, resolve=False)


def _read_text(path: Path, shown: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        beside = [entry.name for entry in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        raise UserError(f"{shown}: no such file{suggest(path.name, beside)}") from None
    except IsADirectoryError:
        raise UserError(f"{shown}: is a folder; name a YAML file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{shown}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{shown}: cannot be read ({reason})") from None


_KIND = {yaml.SequenceNode: "a list", yaml.ScalarNode: "plain text"}


def _refuse_duplicates(root: yaml.Node, source: str) -> None:
    """Raise UserError when a mapping has a key twice: YAML would keep the last one without a word."""
    seen: set[int] = set()

    def visit(node: yaml.Node, path: str) -> None:
        if id(node) in seen:
            return
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            for index, child in enumerate(node.value):
                visit(child, f"{path}[{index}]")
        elif isinstance(node, yaml.MappingNode):
            lines: dict[str, int] = {}
            for key, value in node.value:
                here = f"{path}.{key.value}" if path else str(key.value)
                line = key.start_mark.line + 1
                if here in lines:
                    raise UserError(
                        f"{source}: {here}: given twice, in lines {lines[here]} and {line}; keep one of them"
                    )
                lines[here] = line
                visit(value, here)

    visit(root, "")


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = " ".join(str(getattr(error, "problem", None) or error).split())
    if "'\\t'" in problem:
        problem = "a tab character; YAML is indented with spaces"
    elif "another document" in problem:
        problem = "a second YAML document ('---') begins; a file holds one"
    return f"line {mark.line + 1}: {problem}" if mark is not None else problem


def _interpolation_problem(error: OmegaConfBaseException) -> str:
    value = re.sub(r"\s+", " ", str(error).splitlines()[0])
    return f"{error.full_key}: cannot read the ${{...}} in it ({value})"
