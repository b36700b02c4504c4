"""A named set of configurable modules: what a YAML file may choose from under one key."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, TypeVar

from anymixer.errors import UserError, suggest
from anymixer.options import parse_options

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps names to classes that carry their options in a nested `Config` dataclass."""

    def __init__(self, kind: str, base: type = object) -> None:
        """kind: what the classes are, in words, for messages ("mixer"). base: what each must be a subclass of."""
        self.kind = kind
        self.base = base
        self._classes: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator: make the class known as `name`.

        Raises ValueError when the name is taken, TypeError for a class that is no subclass of `base`.
        """

        def add(cls: type[T]) -> type[T]:
            if not issubclass(cls, self.base):
                raise TypeError(f"{self.kind} '{name}': {cls.__name__} is no subclass of {self.base.__name__}")
            known = self._classes.get(name)
            if known is not None and (known.__module__, known.__qualname__) != (cls.__module__, cls.__qualname__):
                taken = f"{known.__module__}.{known.__qualname__}"
                raise ValueError(f"{self.kind} '{name}' is already registered by {taken}; choose another name")
            self._classes[name] = cls
            return cls

        return add

    def unregister(self, name: str) -> None:
        """Forget `name`; nothing happens when it is not known."""
        self._classes.pop(name, None)

    def names(self) -> list[str]:
        """All registered names, sorted."""
        return sorted(self._classes)

    def get(self, name: str, path: str = "name") -> type[T]:
        """The class registered as `name`; UserError at key `path` lists the names there are."""
        if name not in self._classes:
            raise self.unknown(name, path)
        return self._classes[name]

    def unknown(self, name: str, path: str, elsewhere: Iterable[str] = ()) -> UserError:
        """The error for a name that is not known. elsewhere: names that could be had without being registered yet."""
        known = sorted({*self.names(), *elsewhere})
        return UserError(f"{path}: unknown {self.kind} '{name}'{suggest(name, known)} (known: {', '.join(known)})")

    def parse(self, spec: Mapping[str, Any] | str, path: str) -> tuple[type[T], Any]:
        """Class and typed options of `spec`: a name alone, or a mapping with `name` and options."""
        if isinstance(spec, str):
            spec = {"name": spec}
        if not isinstance(spec, Mapping):
            raise UserError(f"{path}: expected a name or a mapping with a name, got {spec!r}")
        if not isinstance(spec.get("name"), str):
            raise UserError(f"{path}.name: missing; choose a {self.kind}: {', '.join(self.names())}")
        cls = self.get(spec["name"], f"{path}.name")
        options = {key: value for key, value in spec.items() if key != "name"}
        return cls, parse_options(cls.Config, options, path)  # type: ignore[attr-defined]
