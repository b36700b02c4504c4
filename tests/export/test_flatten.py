"""The code of an exported model: complete, without this package, and found by transformers."""

import ast
import sys

import pytest
from transformers.dynamic_module_utils import check_imports, get_relative_import_files

from anymixer.errors import UserError
from anymixer.export.flatten import flatten, write_code
from anymixer.export.heads import FAMILIES
from anymixer.mixers import mixers
from anymixer.mixers.plugins import load_module

ENTRIES = FAMILIES["mixer_bert"].modules()
ALLOWED = {"torch", "transformers", *sys.stdlib_module_names}


def imports(text):
    """(level, module, names) of every import, read from the syntax tree."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.level, node.module, [alias.name for alias in node.names]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", mixers.names())
def test_files_import_each_other_and_what_everybody_has(name, family):
    files = flatten(FAMILIES[family].modules(), [mixers.get(name)]).files
    for file, text in files.items():
        for level, module, names in imports(text):
            if level:
                beside = [module] if module else names
                assert all(f"{other}.py" in files for other in beside), (file, module)
            else:
                assert module.partition(".")[0] in ALLOWED, (file, module)


def test_only_the_chosen_mixers_are_taken_along():
    files = flatten(ENTRIES, [mixers.get("attention")]).files
    assert {name for name in files if name.startswith("mixers")} == {
        "mixers.py",
        "mixers_base.py",
        "mixers_plugins.py",
        "mixers_attention.py",
    }
    assert not any("quasiseparable" in name or "hydra" in name for name in files)
    both = flatten(ENTRIES, [mixers.get("attention"), mixers.get("hydra"), mixers.get("attention")]).files
    assert {"mixers_attention.py", "mixers_hydra.py", "kernels_quasiseparable.py"} <= both.keys()


@pytest.mark.parametrize("entry", ENTRIES)
def test_transformers_finds_every_file_from_the_one_that_is_named(entry, tmp_path):
    """transformers 4 copies the files that the named one imports itself, and follows circles for ever."""
    write_code(flatten(ENTRIES, [mixers.get("hydra")]), tmp_path)
    named = tmp_path / f"{entry.rpartition('.')[2]}.py"
    direct = {f"{name}.py" for name in check_imports(named)}
    everything = {file.rpartition("/")[2] for file in get_relative_import_files(named)}
    assert direct == everything
    for file in direct:
        assert named.name not in {other.rpartition("/")[2] for other in get_relative_import_files(tmp_path / file)}


def test_what_is_for_type_checkers_is_left_out_and_nested_imports_are_rewritten(tmp_path, forget_own_mixers):
    (tmp_path / "my_helper.py").write_text("from torch import nn\nHELP = 2\n")
    mixer = tmp_path / "my_mean.py"
    mixer.write_text(
        "from typing import TYPE_CHECKING\n"
        "from anymixer import Hydra\n"
        "from anymixer.layers import positions\n"
        "from anymixer.mixers import (\n    SequenceMixer,\n    register_mixer as register,\n)\n"
        "from my_helper import HELP\n"
        "if TYPE_CHECKING:\n    from anymixer.training.trainer import fit\n"
        "@register('my_mean')\n"
        "class Mean(SequenceMixer):\n"
        "    def forward(self, hidden_states, packing=None):\n"
        "        import einops\n"
        "        import triton.language as tl\n"
        "        try:\n            from anymixer.layers.step_sizes import draw_step_bias\n"
        "        except ImportError:\n            import absent\n"
        "        from anymixer.layers.norm import GatedRMSNorm\n"
        "        return hidden_states\n"
    )
    sys.path.insert(0, str(tmp_path))
    try:
        load_module(mixers, str(mixer), "module")
        code = flatten(ENTRIES, [mixers.get("my_mean")])
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("my_helper", None)
    text = code.files["user_my_mean.py"]
    assert "from .mixers_hydra import Hydra\n" in text
    assert "from . import layers_positions as positions\n" in text
    assert "from .mixers_base import SequenceMixer, register_mixer as register\n" in text
    assert "from .user_my_helper import HELP\n" in text
    assert "        from .layers_norm import GatedRMSNorm\n" in text
    assert "            from .layers_step_sizes import draw_step_bias\n" in text
    assert (
        "        try:\n            import triton.language as tl\n        except ImportError:\n            raise\n"
        in text
    )
    assert "training" not in text and code.requirements == ["einops"]
    assert {"layers_positions.py", "user_my_helper.py", "layers_norm.py"} <= code.files.keys()
    assert {"my_helper", "anymixer", "anymixer_kernels"} <= set(code.roots)
    ast.parse(text)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("import anymixer.mixers as m", "my_bad.py, line 1: 'import anymixer.mixers' cannot be exported"),
        ("from anymixer.layers.norm import *", "'from anymixer.layers.norm import \\*' cannot be exported"),
    ],
)
def test_imports_that_cannot_be_rewritten_are_named(line, message, tmp_path, forget_own_mixers):
    mixer = tmp_path / "my_bad.py"
    mixer.write_text(
        f"{line}\nfrom anymixer.mixers import SequenceMixer, register_mixer\n"
        "@register_mixer('my_bad')\nclass Bad(SequenceMixer):\n    pass\n"
    )
    load_module(mixers, str(mixer), "module")
    with pytest.raises(UserError, match=message):
        flatten(ENTRIES, [mixers.get("my_bad")])


def test_the_files_are_the_same_every_time():
    first, second = (flatten(ENTRIES, [mixers.get("hydra")]).files for _ in range(2))
    assert first == second
