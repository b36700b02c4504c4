"""Mixers from outside the package: a file or module that a YAML file names, and what installed packages offer.

    model: {mixer: {name: mean, module: my_mixer.py}}      # a file, relative to the current folder
    model: {mixer: {name: mean, module: my_package.mean}}  # an importable module
    [project.entry-points."anymixer.mixers"]               # a package's pyproject.toml; `module` is not needed
    mean = "my_package.mean"

`module` stays in the specification, so every rank, a resumed run and whoever loads the checkpoint find it.
"""

import contextlib
import hashlib
import importlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from anymixer.errors import UserError, suggest
from anymixer.registry import Registry

GROUP = "anymixer.mixers"


def load_plugin(registry: Registry[Any], spec: Any, path: str) -> Any:
    """Import what registers the mixer that `spec` names; return `spec` without its `module`.

    path: the key that holds `spec`, for messages. Raises UserError when the module is missing, raises on
    import, or does not register that name. Importing the same module again does nothing.
    """
    if not isinstance(spec, Mapping) or "module" not in spec:
        name = spec.get("name") if isinstance(spec, Mapping) else spec
        if isinstance(name, str) and name not in registry.names():
            _load_installed(registry, name, f"{path}.name")
        return spec
    rest = {key: value for key, value in spec.items() if key != "module"}
    offered = load_module(registry, spec["module"], f"{path}.module")
    name = rest.get("name")
    if isinstance(name, str) and name not in offered:
        raise UserError(_not_offered(registry, name, str(spec["module"]), offered, path))
    return rest


def load_module(registry: Registry[Any], module: Any, key: str) -> list[str]:
    """Import a file (a path that ends in .py) or a dotted module, and return the names that it registers."""
    if not isinstance(module, str) or not module:
        raise UserError(f"{key}: {module!r} is neither a file such as my_mixer.py nor a module's name")
    before = set(registry.names())
    try:
        loaded = _import_file(Path(module), key) if _is_file(module) else _import_name(module, key)
    except BaseException:
        for name in set(registry.names()) - before:
            registry.unregister(name)  # a module that is half imported offers nothing
        raise
    return _names_of(registry, loaded)


def load_all_installed(registry: Registry[Any]) -> dict[str, str]:
    """Import every installed package's mixers; return name -> reason for those that cannot be had."""
    failed = {}
    for point in entry_points(group=GROUP):
        try:
            _load_entry_point(registry, point, point.name)
        except UserError as error:
            failed[point.name] = str(error)
    return failed


def origin(cls: type) -> str:
    """Where a class comes from, in words: this package, a file of the user's, or a module."""
    if cls.__module__.partition(".")[0] == "anymixer":
        return "anymixer"
    file = getattr(sys.modules.get(cls.__module__), "__file__", None)
    return os.path.relpath(file) if file and cls.__module__ == _module_name(Path(file)) else cls.__module__


def absolute_modules(mixer: Any) -> Any:
    """A mixer's specification, or a list of them, with every file it names as an absolute path."""
    if isinstance(mixer, (list, tuple)):
        return [absolute_modules(spec) for spec in mixer]
    if isinstance(mixer, Mapping) and isinstance(mixer.get("module"), str) and _is_file(mixer["module"]):
        return {**mixer, "module": str(_resolved(Path(mixer["module"])))}
    return mixer


def module_files(mixer: Any) -> list[Path]:
    """The files that a mixer's specification, or a list of them, names; each once, in order."""
    specs = mixer if isinstance(mixer, (list, tuple)) else [mixer]
    named = [s["module"] for s in specs if isinstance(s, Mapping) and isinstance(s.get("module"), str)]
    return list(dict.fromkeys(_resolved(Path(text)) for text in named if _is_file(text)))


def _is_file(module: str) -> bool:
    return module.endswith(".py") or "/" in module or os.sep in module


def _resolved(file: Path) -> Path:
    return file.expanduser().resolve()


def _module_name(file: Path) -> str:
    """A name of its own for each file: two files may be called the same in different folders."""
    digest = hashlib.sha256(str(_resolved(file)).encode()).hexdigest()[:8]
    return f"anymixer_user_{file.stem}_{digest}"


def _import_file(file: Path, key: str) -> ModuleType:
    path = _resolved(file)
    if not path.is_file():
        beside = [entry.name for entry in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise UserError(f"{key}: no such file: {file} (looked in {path.parent}){suggest(path.name, beside)}")
    for known in list(sys.modules.values()):  # imported before, by us or in the user's own program
        if getattr(known, "__dict__", {}).get("__file__") == str(path):  # lazy modules act on getattr
            return known
    spec = importlib.util.spec_from_file_location(_module_name(path), path)
    if spec is None or spec.loader is None:
        raise UserError(f"{key}: {file} is no Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        with _one_line_errors(str(file), str(path), key):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module


def _import_name(name: str, key: str) -> ModuleType:
    """Import a module as `python -m` finds it, in the current folder too."""
    sys.path.append(os.getcwd())
    try:
        with _one_line_errors(name, None, key):
            return importlib.import_module(name)
    finally:
        sys.path.remove(os.getcwd())


@contextlib.contextmanager
def _one_line_errors(shown: str, file: str | None, key: str) -> Iterator[None]:
    """Turn whatever an import raises into a UserError that says what, and where in `file` or the last frame."""
    try:
        yield
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [frame for frame in frames if frame.filename == file] or frames
        line = error.lineno if isinstance(error, SyntaxError) else own[-1].lineno
        place = f"{shown}, line {line}" if file else shown
        reason = " ".join(str(error).split())
        raise UserError(f"{key}: {place}: cannot be imported: {type(error).__name__}: {reason}") from error


def _load_installed(registry: Registry[Any], name: str, key: str) -> None:
    points = entry_points(group=GROUP)
    if name not in points.names:
        raise registry.unknown(name, key, elsewhere=points.names)
    for point in points.select(name=name):
        _load_entry_point(registry, point, key)


def _load_entry_point(registry: Registry[Any], point: EntryPoint, key: str) -> None:
    package = point.dist.name if point.dist else "an installed package"
    with _one_line_errors(f"'{point.name}' of {package} ({point.value})", None, key):
        point.load()
        if point.name not in registry.names():
            raise ValueError(f"{point.value} registers no {registry.kind} of that name")
        if origin(registry.get(point.name)) == "anymixer":
            raise ValueError(
                f"{registry.kind} '{point.name}' comes with anymixer; the package must choose another name"
            )


def _names_of(registry: Registry[Any], module: ModuleType) -> list[str]:
    """The names whose classes were defined in a module or beneath it, or are held by it."""
    held = {id(value) for value in vars(module).values()}
    names = []
    for name in registry.names():
        cls = registry.get(name)
        beneath = f"{cls.__module__}.".startswith(f"{module.__name__}.")
        if (beneath or id(cls) in held) and origin(cls) != "anymixer":
            names.append(name)
    return names


def _not_offered(registry: Registry[Any], name: str, module: str, offered: list[str], path: str) -> str:
    known = ", ".join(offered) or f'no {registry.kind}; is its class under @register_{registry.kind}("{name}")?'
    shipped = name in registry.names() and origin(registry.get(name)) == "anymixer"
    hint = "; remove `module` to take the one that comes with anymixer" if shipped else suggest(name, offered)
    return f"{path}.name: {module} registers no {registry.kind} '{name}' (it registers: {known}){hint}"
