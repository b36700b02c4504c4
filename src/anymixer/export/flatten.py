"""Writes the code of a model as flat files that import each other and nothing of this package.

transformers loads the code of a model folder as modules of one folder, which it finds by looking for lines
`from .name import ...`. So `anymixer.layers.packing` becomes `layers_packing.py`, and its imports are rewritten. Taken
along is what the models and the chosen mixers import, whether a mixer comes with this package or is a user's. All heads
stand in one file: a model that is saved again has the file of its class with it, and is to be loaded with any head.
"""

import ast
import hashlib
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import anymixer
from anymixer.errors import UserError
from anymixer.export.heads import Family
from anymixer.export.join_modules import join_modules
from anymixer.export.module_files import ModuleFiles

# Replaced by what `_mixers_file` and `_plugins_file` write: the first imports every file of its folder, the second
# whatever a configuration names.
_MIXERS, _PLUGINS = "anymixer.mixers", "anymixer.mixers.plugins"
_MODELS = "anymixer.models."
# What custom operators are called here; PyTorch has one table of them for a process.
_OPERATORS = "anymixer::"
_FORGET_OTHERS = """\
import sys

_mixers = sys.modules.get(f"{{__package__}}.mixers")
if _mixers is not None and getattr(_mixers, "CODE", None) != "{code}":
    # What transformers 4 has in memory is of another folder of the same name.
    for _name in [_name for _name in sys.modules if _name.startswith(f"{{__package__}}.") and _name != __name__]:
        del sys.modules[_name]
"""
# Every environment that can load a model has these.
_PROVIDED = {"torch", "transformers", "numpy", "safetensors"}
# Where these are absent, other code takes their place.
_OPTIONAL = {"triton"}
_FOR_TYPE_CHECKERS = ("TYPE_CHECKING", "typing.TYPE_CHECKING")


@dataclass
class FlatCode:
    """files: name -> text. requirements: packages that the code imports besides torch, transformers and what these
    bring, because a user's mixer does. roots: packages that are taken along, so that the files must do without them."""

    files: dict[str, str]
    requirements: list[str]
    roots: list[str]


def flatten(family: Family, mixer_classes: Sequence[type]) -> FlatCode:
    """The files of a model's code.

    mixer_classes: the registered classes of the model's mixers. Raises UserError for a mixer whose code cannot be
    taken along.
    """
    return _Flattener(mixer_classes).run(family)


@dataclass
class _Import:
    """A statement of a module: lines [start, end) of it, indented by `indent`, and what stands there instead."""

    start: int
    end: int
    indent: int
    lines: list[str]
    needs: list[str] = field(default_factory=list)


class _Flattener:
    def __init__(self, mixer_classes: Sequence[type]) -> None:
        self.mixers = list(dict.fromkeys(mixer_classes))
        self.found = ModuleFiles([cls.__module__ for cls in self.mixers])
        self.requirements: set[str] = set()
        self.texts: dict[str, str] = {}
        self.needs: dict[str, list[str]] = {}

    def run(self, family: Family) -> FlatCode:
        configuration, *heads = family.modules()
        waiting = [configuration, *heads, _MIXERS]
        while waiting:
            module = waiting.pop()
            if module not in self.texts:
                self.texts[module], self.needs[module] = self._file(module)
                waiting += self.needs[module]
        self._join(heads)
        code = hashlib.sha256("".join(self.texts[module] for module in sorted(self.texts)).encode()).hexdigest()[:16]
        self.texts[_MIXERS] += f'\nCODE = "{code}"\n'
        classes = {auto: name.partition(".")[2] for auto, name in family.auto_map().items()}
        for entry, names in ((configuration, ["AutoConfig"]), (heads[0], list(family.heads))):
            beside = sorted(self.found.flat_name(module) for module in self._all_needs(entry))
            text = _as_entry(self.texts[entry], beside, code if entry == configuration else None)
            self.texts[entry] = _registering(text, {name: classes[name] for name in names})
        files = {f"{self.found.flat_name(module)}.py": text for module, text in sorted(self.texts.items())}
        return FlatCode(files, sorted(self.requirements), sorted(self.found.roots))

    def _join(self, modules: Sequence[str]) -> None:
        """Put modules into the first one's file."""
        names = [self.found.flat_name(module) for module in modules]
        self.texts[modules[0]] = join_modules([self.texts[module] for module in modules], names)
        self.needs[modules[0]] = [n for module in modules for n in self.needs[module] if n not in modules]
        for module in modules[1:]:
            del self.texts[module], self.needs[module]

    def _all_needs(self, module: str) -> set[str]:
        """What a module imports, directly or not."""
        found: set[str] = set()
        waiting = list(self.needs[module])
        while waiting:
            need = waiting.pop()
            if need not in found:
                found.add(need)
                waiting += self.needs[need]
        return found

    def _file(self, module: str) -> tuple[str, list[str]]:
        """The text of a module's file, and the modules that it needs."""
        if module == _MIXERS:
            return self._mixers_file()
        if module == _PLUGINS:
            return _plugins_file(), []
        source = self.found.path(module).read_text(encoding="utf-8")
        imports = [self._rewritten(node, tried, module) for node, tried in self._statements(ast.parse(source))]
        changed = [found for found in imports if found is not None]
        lines = source.splitlines()
        for found in sorted(changed, key=lambda found: found.start, reverse=True):
            lines[found.start : found.end] = [" " * found.indent + line for line in found.lines]
        head = f"# {module} of anymixer {anymixer.__version__}, as `anymixer export` writes it."
        if not self.found.is_ours(module):
            head = f"# {self.found.path(module).name}, as `anymixer export` writes it."
        # Two folders that are loaded may be of different versions, whose operators take different arguments.
        operators = f"anymixer_{hashlib.sha256(source.encode()).hexdigest()[:8]}::"
        text = "\n".join([head, *lines]).replace(_OPERATORS, operators) + "\n"
        return text, [need for found in changed for need in found.needs]

    def _mixers_file(self) -> tuple[str, list[str]]:
        base = "anymixer.mixers.base"
        lines = [
            '"""The sequence mixers of this model."""',
            "",
            f"from .{self.found.flat_name(base)} import SequenceMixer, as_causal, build_mixer, mixers, register_mixer",
            *(f"from .{self.found.flat_name(cls.__module__)} import {cls.__name__}" for cls in self.mixers),
        ]
        return "\n".join(lines) + "\n", [base, *(cls.__module__ for cls in self.mixers)]

    def _statements(self, tree: ast.AST, tried: bool = False) -> Iterable[tuple[ast.stmt, bool]]:
        """Every import, wherever it stands, and every block for type checkers as one statement; and whether it is
        tried, so that what it imports may be absent."""
        for node in ast.iter_child_nodes(tree):
            unchecked = isinstance(node, ast.If) and ast.unparse(node.test) in _FOR_TYPE_CHECKERS
            if unchecked or isinstance(node, (ast.Import, ast.ImportFrom)):
                yield node, tried  # type: ignore[misc]
            else:
                yield from self._statements(node, tried or isinstance(node, ast.Try))

    def _rewritten(self, node: ast.stmt, tried: bool, module: str) -> _Import | None:
        start, end = node.lineno - 1, node.end_lineno or node.lineno
        if isinstance(node, ast.If):
            end = node.body[-1].end_lineno or end
            return _Import(start, end, node.col_offset, _unchecked(node))
        assert isinstance(node, (ast.Import, ast.ImportFrom))
        if isinstance(node, ast.Import):
            self._check_plain_import(node, module)
            sources = [alias.name for alias in node.names]
        else:
            sources = [self.found.absolute(node, module)]
            if self.found.is_taken(sources[0], module):
                return _Import(start, end, node.col_offset, *self._relative_imports(sources[0], node.names, module))
        if tried:
            return None
        if any(source.partition(".")[0] in _OPTIONAL for source in sources):
            # transformers asks for whatever a file imports outside of `try`, even where it is never run.
            return _Import(
                start, end, node.col_offset, ["try:", f"    {ast.unparse(node)}", "except ImportError:", "    raise"]
            )
        for source in sources:
            self._note_requirement(source, module)
        return None

    def _relative_imports(self, source: str, names: list[ast.alias], module: str) -> tuple[list[str], list[str]]:
        """`from source import names` as imports from files beside, one line for each module that defines a name."""
        groups: dict[str, list[str]] = {}
        lines, needs = [], []
        for alias in names:
            if alias.name == "*":
                raise UserError(f"{self.found.path(module)}: 'from {source} import *' cannot be exported; name them")
            submodule = f"{source}.{alias.name}"
            if self.found.exists(submodule):
                lines.append(f"from . import {self.found.flat_name(submodule)} as {alias.asname or alias.name}")
                needs.append(submodule)
                continue
            # Inside a mixer, names of the package of mixers come from where they are defined: that package's file
            # imports the mixer.
            whole = source == _MIXERS and module.startswith(_MODELS)
            home = source if whole else self.found.home(source, alias.name)
            text = alias.name if alias.asname is None else f"{alias.name} as {alias.asname}"
            groups.setdefault(home, []).append(text)
        for home, texts in groups.items():
            lines.append(f"from .{self.found.flat_name(home)} import {', '.join(texts)}")
            needs.append(home)
        return lines, needs

    def _check_plain_import(self, node: ast.Import, module: str) -> None:
        for alias in node.names:
            if self.found.is_taken(alias.name, module):
                where = f"{self.found.path(module)}, line {node.lineno}"
                raise UserError(f"{where}: 'import {alias.name}' cannot be exported; write 'from ... import ...'")

    def _note_requirement(self, source: str, module: str) -> None:
        top = source.partition(".")[0]
        if top in sys.stdlib_module_names or top in _PROVIDED:
            return
        assert not self.found.is_ours(module), f"{module} imports {source}, which exported models must do without"
        self.requirements.add(top)


def _unchecked(node: ast.If) -> list[str]:
    """What becomes of a block for type checkers: one that is empty, and is left out where that can be."""
    return ["if False:", "    pass"] if node.orelse or node.col_offset else []


def _plugins_file() -> str:
    return (
        '"""All mixers of this model are files of this folder; a configuration cannot name others."""\n\n\n'
        'def load_plugin(registry, spec, path):\n    """Return `spec` as it is."""\n    return spec\n'
    )


def _as_entry(text: str, beside: list[str], code: str | None) -> str:
    """Add to a file that a `config.json` names what transformers 4 needs to load the files `beside` with it.

    code: what tells this model's files from others', for the file that is run first.
    """
    lines = [
        "if False:  # transformers 4 copies, of a local folder, only the files that this one names",
        *(f"    from .{file} import __name__ as _" for file in beside),
        "",
    ]
    if code is not None:
        lines = [*_FORGET_OTHERS.format(code=code).splitlines(), *lines]
    rows = text.splitlines()
    place = _first_import(text)
    return "\n".join([*rows[:place], *lines, *rows[place:]]) + "\n"


def _registering(text: str, classes: Mapping[str, str]) -> str:
    """Add to a file what makes transformers 4.51 save the code with the model; later ones see to it themselves.

    classes: name in transformers -> class in the file.
    """
    lines = [f'{name}.register_for_auto_class("{auto}")' for auto, name in classes.items()]
    return "\n".join([text, "", "# A model that is saved again has its code with it.", *lines]) + "\n"


def _first_import(text: str) -> int:
    """The line, from 0, of the first import that is none of `__future__`."""
    for node in ast.parse(text).body:
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and node.module != "__future__"):
            return node.lineno - 1
    raise AssertionError("a module of models without imports")


def write_code(code: FlatCode, folder: Path) -> None:
    """Write the files into `folder`."""
    for name, text in code.files.items():
        (folder / name).write_text(text, encoding="utf-8")
