"""YAML files and `key=value` overrides to one checked dataclass, and back.

    schema defaults <- files under `inherits:` <- the file <- overrides

Each layer is checked alone, then all are merged, `${...}` is resolved, and the dataclass validates itself.
Past this module there are only dataclasses.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

from omegaconf import OmegaConf
from omegaconf.errors import InterpolationKeyError, MissingMandatoryValue, OmegaConfBaseException

from anymixer.config.base import ConfigSchema
from anymixer.config.check import check_values, known_keys
from anymixer.config.layers import Layer, cleared, file_layers, lookup, merge, override_layer, source_of
from anymixer.config.read import nest
from anymixer.config.schema import PretrainConfig
from anymixer.errors import UserError, suggest

Schema = TypeVar("Schema", bound=ConfigSchema)


def load_config(
    path: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    schema: type[Schema] = PretrainConfig,
    checks: Sequence[Callable[[Schema], None]] = (),
) -> Schema:
    """Return the dataclass `schema` filled from the YAML file `path` and `key.sub=value` overrides.

    checks: called with the dataclass after its own `validate()`; where a UserError of theirs starts with a
    key ("callbacks.lr_monitr: ..."), the file that sets it is added, as it is for `validate()`.
    Raises UserError, one line that names the file (or "command line") and the key, for a file that cannot
    be read, an unknown, refused or ill-typed key, a `${...}` that leads nowhere, or impossible values.
    """
    path = Path(path)
    files = file_layers(path)
    layers = [*files, override_layer(overrides, files, schema.REPLACED_BY_NAME)]
    for layer in layers:
        check_values(layer.values, schema, lambda _, source=layer.source: source, schema.REFUSED, schema.CLEARABLE)

    def blame(key: str) -> str:
        return source_of(key, layers)

    merged = _resolved(_with_defaults(layers, schema, path.stem), schema, blame)
    values = cleared(merged, schema.CLEARABLE)
    check_values(values, schema, blame, resolved=True)
    config = cast(Schema, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), _escaped(values))))
    try:
        for section in schema.CLEARABLE:
            for name in (merged.get(section) or {}).keys() - values[section].keys():
                schema.check_cleared(section, name)
        config.validate()
        for check in checks:
            check(config)
    except UserError as error:
        key = re.match(r"[\w.-]*", str(error))
        raise UserError(f"{blame(key.group() if key else '')}: {error}") from None
    return config


def dump_config(config: ConfigSchema) -> str:
    """Return a dataclass as YAML with every key, which `load_config` reads back to an equal dataclass."""
    values = dataclasses.asdict(config)  # pyright: ignore[reportArgumentType]
    return OmegaConf.to_yaml(OmegaConf.create(_escaped(values)))


def _with_defaults(layers: Sequence[Layer], schema: type[Schema], stem: str) -> dict[str, Any]:
    """Merge the layers over the dataclass's defaults and under what `unset_values` fills in."""
    defaults = cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(schema)))
    given = merge(layers, schema.REPLACED_BY_NAME)
    unset = [
        Layer("", nest(key, value))
        for key, value in schema.unset_values(given, stem).items()
        if lookup(given, key) is None
    ]
    return merge([Layer("", defaults), *layers, *unset], schema.REPLACED_BY_NAME)


def _resolved(values: dict[str, Any], schema: type, blame: Callable[[str], str]) -> dict[str, Any]:
    """Return plain values with every `${...}` replaced by what it names."""
    try:
        container = OmegaConf.to_container(OmegaConf.create(values), resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        key = str(error.full_key)
        raise UserError(f"{blame(key)}: {key}: {_unresolved(error, values, schema)}") from None
    return cast(dict[str, Any], container)


def _unresolved(error: OmegaConfBaseException, values: Mapping[str, Any], schema: type) -> str:
    if isinstance(error, MissingMandatoryValue):
        return "must be set; no file and no override gives it a value"
    written = lookup(values, str(error.full_key))
    shown = f"'{written}'" if isinstance(written, str) else "an interpolation"
    if isinstance(error, InterpolationKeyError):
        name = re.search(r"Interpolation key '([^']*)'", str(error))
        near = suggest(name.group(1), known_keys(schema)) if name else ""
        return f"{shown} names a key that does not exist{near}"
    return f"{shown} cannot be resolved: {_one_line(error)}"


def _one_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def _escaped(value: Any) -> Any:
    """Return plain values in which a literal `${` is written so that OmegaConf reads it as text."""
    if isinstance(value, Mapping):
        return {key: _escaped(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_escaped(item) for item in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value
