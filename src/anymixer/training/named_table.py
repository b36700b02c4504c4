"""One table of names that a YAML section may use, each standing for a class or function elsewhere.

A section is a mapping of names to keyword arguments:

    callbacks:
      speed_monitor: {window_size: 10}
      lr_monitor: {}

Names and arguments are checked against the factory's own signature before anything is built.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from anymixer.errors import UserError, suggest


@dataclass(frozen=True)
class NamedTable:
    """The names of one section.

    section: the YAML key, for messages ("callbacks").
    factories: name -> "module:attribute", imported only when the name is used.
    refused: names other recipes carry -> why this one does not take them and what to write instead.
    packages: name -> the optional package that it needs; `extra` is the pip extra that installs it.
    one_name: the section names one entry by its key `name` (optimizer, scheduler), not several by their keys.
    """

    section: str
    factories: Mapping[str, str]
    refused: Mapping[str, str] = field(default_factory=dict)
    packages: Mapping[str, str] = field(default_factory=dict)
    extra: str = ""
    one_name: bool = False

    def factory(self, name: str) -> Callable[..., Any]:
        """Return what `name` stands for.

        Raises UserError for an unknown or refused name, or where the package that it needs is missing.
        """
        key = f"{self.section}.name: '{name}'" if self.one_name else f"{self.section}.{name}"
        if name in self.refused:
            raise UserError(f"{key}: {self.refused[name]}")
        if name not in self.factories:
            known = ", ".join(sorted(self.factories))
            raise UserError(f"{key}: unknown name{suggest(name, self.factories)} (known: {known})")
        package = self.packages.get(name)
        if package is not None and find_spec(package) is None:
            raise UserError(
                f"{key}: needs the package {package}; run: pip install {package} (or pip install -e '.[{self.extra}]')"
            )
        module, attribute = self.factories[name].split(":")
        return getattr(import_module(module), attribute)

    def check(self, section: Mapping[str, Any] | None) -> None:
        """Raise UserError for an unknown name or a keyword argument that its factory does not take."""
        for name, kwargs in (section or {}).items():
            key = f"{self.section}.{name}"
            check_kwargs(self.factory(name), _kwargs(kwargs, key), key)

    def build(self, section: Mapping[str, Any] | None) -> list[Any]:
        """Build all that the section names, in its order. Raises UserError for arguments that are refused."""
        return [self.build_one(name, kwargs) for name, kwargs in (section or {}).items()]

    def build_one(self, name: str, kwargs: Mapping[str, Any] | None) -> Any:
        """Build one entry from its keyword arguments."""
        key = self.section if self.one_name else f"{self.section}.{name}"
        factory, kwargs = self.factory(name), _kwargs(kwargs, key)
        check_kwargs(factory, kwargs, key)
        try:
            return factory(**kwargs)
        except UserError:
            raise
        except (ValueError, TypeError) as error:
            raise UserError(f"{key}: {' '.join(str(error).split())}") from error


def _kwargs(kwargs: Any, key: str) -> dict[str, Any]:
    if kwargs is None:
        return {}
    if not isinstance(kwargs, Mapping):
        raise UserError(f"{key}: {kwargs!r} must be a mapping of its arguments, or {{}} for none")
    return dict(kwargs)


def check_kwargs(
    factory: Callable[..., Any], kwargs: Mapping[str, Any], key: str, supplied: tuple[str, ...] = ()
) -> None:
    """Raise UserError for an argument `factory` does not have, or a required one that is missing.

    `supplied` names the arguments that the caller adds itself and the user may not set.
    """
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(factory).parameters.items()
        if name not in supplied and parameter.kind is not inspect.Parameter.VAR_POSITIONAL
    }
    catch_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    named = {n: p for n, p in parameters.items() if p.kind is not inspect.Parameter.VAR_KEYWORD}
    for name in kwargs:
        if name in supplied or (name not in named and not catch_all):
            known = f" (known: {', '.join(named)})" if named else " (it takes no arguments)"
            raise UserError(f"{key}.{name}: unknown key{suggest(name, named)}{known}")
    for name, parameter in named.items():
        if parameter.default is inspect.Parameter.empty and name not in kwargs:
            raise UserError(f"{key}.{name}: missing, and it has no default")
