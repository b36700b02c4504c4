"""Which modules an exported model takes along, where their files are, and what they are called in its folder."""

import ast
import importlib
import importlib.util
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from anymixer.errors import UserError

OURS = ("anymixer", "anymixer_kernels")


class ModuleFiles:
    """The modules of this package, and those that the given mixers' modules belong to."""

    def __init__(self, mixer_modules: Iterable[str]) -> None:
        self.roots = {*OURS, *(module.partition(".")[0] for module in mixer_modules)}
        self._names: dict[str, str] = {}

    def is_ours(self, module: str) -> bool:
        """Whether a module comes with this package."""
        return module.partition(".")[0] in OURS

    def is_taken(self, module: str, importer: str) -> bool:
        """Whether what `importer` calls `module` is to be taken along."""
        root = module.partition(".")[0]
        if root not in self.roots and not self.is_ours(importer) and self._lies_beside(root, importer):
            self.roots.add(root)
        return root in self.roots

    def _lies_beside(self, root: str, importer: str) -> bool:
        """Whether a user's file imports another one of its folder."""
        file = getattr(sys.modules.get(root), "__file__", None)
        folder = self.path(importer).parent
        return file is not None and Path(file).resolve() in (folder / f"{root}.py", folder / root / "__init__.py")

    def path(self, module: str) -> Path:
        """The file of a module. Raises UserError where there is none to read."""
        path = self._find(module)
        if path is None or path.suffix != ".py":
            raise UserError(f"{module}: cannot be exported: there is no Python file of it")
        return path

    def exists(self, module: str) -> bool:
        """Whether there is a module of that name."""
        return self._find(module) is not None

    def _find(self, module: str) -> Path | None:
        loaded = getattr(sys.modules.get(module), "__file__", None)
        if loaded is not None:
            return Path(loaded).resolve()
        try:
            spec = importlib.util.find_spec(module)
        except (ModuleNotFoundError, ValueError):  # its parent is no package, or it is none that was imported by name
            return None
        return Path(spec.origin).resolve() if spec is not None and spec.origin is not None else None

    def absolute(self, node: ast.ImportFrom, importer: str) -> str:
        """The module that an import names, relative or not."""
        if not node.level:
            assert node.module is not None
            return node.module
        package = importer if self.path(importer).name == "__init__.py" else importer.rpartition(".")[0]
        return importlib.util.resolve_name("." * node.level + (node.module or ""), package)

    def home(self, source: str, name: str) -> str:
        """The module that defines what `source` calls `name`: packages re-export."""
        if self.path(source).name != "__init__.py":
            return source
        lazy = getattr(importlib.import_module(source), "_LAZY", {})
        if name in lazy:
            return lazy[name]
        for node in ast.parse(self.path(source).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ImportFrom) and any((a.asname or a.name) == name for a in node.names):
                origin = self.absolute(node, source)
                if origin.partition(".")[0] in self.roots:
                    return self.home(origin, name)
        return source

    def flat_name(self, module: str) -> str:
        """The name of a module's file in an exported folder, without `.py`: the same at every call."""
        if module not in self._names:
            name = _flat(module)
            while name in self._names.values():
                name += "_"
            self._names[module] = name
        return self._names[module]


def _flat(module: str) -> str:
    if module.startswith("anymixer.models."):
        return module.removeprefix("anymixer.models.")
    if module.partition(".")[0] == "anymixer_kernels":
        return module.removeprefix("anymixer_").replace(".", "_")
    if module.startswith("anymixer."):
        return module.removeprefix("anymixer.").replace(".", "_")
    # A user's file is loaded under a name that ends in a digest of its path.
    return "user_" + re.sub(r"\W", "_", re.sub(r"^anymixer_user_(.*)_[0-9a-f]{8}$", r"\1", module))
