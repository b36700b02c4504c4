"""The embedded default corpus: English prose that is on every machine that can run Anymixer.

Read from files, never by importing what they document: the reference pages of pydoc, the docstrings of the
standard library and of libraries that are always installed with Anymixer, and the licence texts of the
installed packages. Order and text depend on the installed versions alone.
"""

from __future__ import annotations

import ast
import importlib.util
import os
import site
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from data_prep.prose import Deduplicator, paragraphs

# The parts of the standard library without documentation worth reading: its tests and vendored wheels.
_SKIPPED_FOLDERS = frozenset(
    {
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idle_test",
        "lib2to3",
        "ensurepip",
        "_vendor",
        "pydoc_data",
    }
)
_LIBRARY_FOLDERS = (
    ("numpy", ""),
    ("composer", ""),
    ("streaming", ""),
    ("torch", "nn"),
    ("torch", "optim"),
    ("torch", "distributions"),
    ("torch", "utils"),
    ("torch", "distributed"),
    ("torch", "autograd"),
    ("transformers", "generation"),
    ("transformers", "utils"),
    ("datasets", ""),
    ("networkx", ""),
    ("pandas", ""),
)
_LICENCE_NAMES = ("LICEN", "COPYING", "NOTICE")
_MIN_DOCUMENT_CHARS = 200


def demo_documents() -> Iterator[str]:
    """Yield the documents of the demo corpus: paragraphs of clean prose, one on a line.

    A document is a reference page, a licence, or the docstrings of one module. No paragraph appears twice,
    nor nearly so, in the whole corpus.
    """
    unseen = Deduplicator()
    for candidates in _candidates():
        text = "\n".join(unseen.fresh(candidates))
        if len(text) >= _MIN_DOCUMENT_CHARS:
            yield text


def _candidates() -> Iterator[list[str]]:
    """Yield the paragraphs of each document, the best prose first: it wins where texts repeat one another."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    for page in reference_pages(stdlib / "pydoc_data" / "topics.py"):
        yield paragraphs(page)
    with ProcessPoolExecutor(max_workers=min(os.cpu_count() or 1, 8)) as pool:
        yield from pool.map(_module_paragraphs, _modules(stdlib), chunksize=16)
    for path in _licences():
        yield paragraphs(path.read_text(encoding="utf-8", errors="replace"))


def _modules(stdlib: Path) -> Iterator[Path]:
    yield from _python_files(stdlib)
    for package, folder in _LIBRARY_FOLDERS:
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            yield from _python_files(Path(spec.origin).parent / folder)


def _module_paragraphs(path: Path) -> list[str]:
    return [paragraph for text in docstrings(path) for paragraph in paragraphs(text)]


def reference_pages(path: Path) -> Iterator[str]:
    """Yield the pages of pydoc's topics module, the text behind Python's `help("topic")`; none if absent."""
    if not path.is_file():
        return
    for node in ast.parse(path.read_bytes()).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Dict):
            yield from ast.literal_eval(node.value).values()


def docstrings(path: Path) -> list[str]:
    """Return the docstrings of a Python source file in the order of the file; none if it does not parse."""
    source = path.read_bytes()
    if b'"""' not in source and b"'''" not in source:
        return []
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # test data and templates of other versions
        return []
    found = []
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            text = ast.get_docstring(node)
            if text:
                found.append(text)
            pending.extend(reversed(node.body))  # documentation lives on definitions, not in expressions
        elif isinstance(node, (ast.If, ast.Try)):
            pending.extend(reversed(node.body))
    return found


def _python_files(folder: Path) -> list[Path]:
    files = (path for path in folder.rglob("*.py") if not _SKIPPED_FOLDERS & set(path.relative_to(folder).parts))
    return sorted(files, key=lambda path: path.relative_to(folder).as_posix())


def _licences() -> list[Path]:
    """Return the licence files of the installed distributions, in the order of their names."""
    folders = {Path(sysconfig.get_path("purelib")), *map(Path, site.getsitepackages())}
    found = {
        path.relative_to(folder).as_posix(): path
        for folder in sorted(folders)
        for path in folder.glob("*.dist-info/**/*")
        if path.name.upper().startswith(_LICENCE_NAMES) and path.is_file()
    }
    return [found[name] for name in sorted(found)]
