"""The import direction of docs/architecture.md, read from the source files."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A module may import from its own layer and from those before it.
LAYERS = [
    ("anymixer_kernels",),
    (
        "anymixer.errors",
        "anymixer.files",
        "anymixer.labels",
        "anymixer.options",
        "anymixer.registry",
        "anymixer.entry_point",
    ),
    ("anymixer.layers",),
    ("anymixer.mixers",),
    ("anymixer.models",),
    ("anymixer.data",),
    ("anymixer.checkpoints",),
    ("anymixer.training",),
    ("anymixer.glue",),
    ("anymixer.config",),
    (
        "anymixer.export",
        "anymixer.describe",
        "anymixer.pretrain",
        "anymixer.fill_mask",
        "anymixer.generate",
        "anymixer.inspect_checkpoint",
        "anymixer.report",
        "anymixer.compare",
        "anymixer.finetune",
        "anymixer.inspect_checkpoint",
    ),
    ("anymixer.cli", "main", "glue", "data_prep"),
]
SOURCES = [
    *ROOT.glob("kernels/**/*.py"),
    *ROOT.glob("src/**/*.py"),
    *ROOT.glob("data_prep/*.py"),
    ROOT / "main.py",
    ROOT / "glue.py",
]


def module_name(path):
    relative = path.relative_to(ROOT)
    parts = list(relative.with_suffix("").parts)
    if parts[0] in ("src", "kernels"):
        parts = parts[1:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(name):
    for level, prefixes in enumerate(LAYERS):
        if any(name == p or name.startswith(p + ".") for p in prefixes):
            return level
    return None


def imported_names(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert all(alias.name != "*" for alias in node.names), f"{path}: star import"
            yield node.module


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_imports_point_downwards(path):
    name = module_name(path)
    if name in ("anymixer", "anymixer_kernels"):
        return  # they re-export names of their own modules
    level = layer_of(name)
    assert level is not None, f"{name} has no layer: add it to LAYERS and docs/architecture.md"
    for imported in imported_names(path):
        target = layer_of(imported)
        if target is not None:
            assert target <= level, f"{name} imports {imported}, which stands above it"


def test_omegaconf_stays_in_config():
    for path in SOURCES:
        if "omegaconf" in {name.partition(".")[0] for name in imported_names(path)}:
            assert module_name(path).startswith("anymixer.config"), path


def test_every_source_file_is_short():
    for path in SOURCES:
        assert len(path.read_text().splitlines()) <= 400, path


@pytest.mark.parametrize(
    "package",
    ["anymixer", "anymixer.models", "anymixer.config", "anymixer.data", "anymixer.training", "anymixer.glue.runner"],
)
def test_importing_touches_nothing_heavy(package):
    heavy = ("composer", "streaming", "transformers", "triton", "mamba_ssm")
    code = f"import sys, {package}; print(*(m for m in {heavy} if m in sys.modules))"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment, cwd=ROOT
    )
    assert result.stdout.split() == []
