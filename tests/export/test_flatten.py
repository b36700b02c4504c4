"""The code of an exported model: complete, without this package, and found by transformers."""

import ast
import sys

import pytest
from transformers.dynamic_module_utils import check_imports, get_relative_import_files

from anymixer.errors import UserError
from anymixer.export.flatten import flatten, write_code
from anymixer.export.heads import FAMILIES
from anymixer.export.join_modules import join_modules
from anymixer.mixers import mixers
from anymixer.mixers.plugins import load_module

BERT = FAMILIES["mixer_bert"]
ALLOWED = {"torch", "transformers", *sys.stdlib_module_names}


def imports(text):
    """(level, module, names) of every import that is not tried, read from the syntax tree."""
    tree = ast.parse(text)
    tried = {id(node) for outer in ast.walk(tree) if isinstance(outer, ast.Try) for node in ast.walk(outer)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import) and id(node) not in tried:
            yield from ((0, alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and id(node) not in tried:
            yield node.level, node.module, [alias.name for alias in node.names]


def imported_on_loading(files, entry):
    """The files that are run when `entry` is imported: what stands in functions and `if` is not."""
    found, waiting = set(), [entry]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            body = ast.parse(files[f"{name}.py"]).body
            for node in body:
                if isinstance(node, ast.ImportFrom) and node.level:
                    waiting += [node.module] if node.module else [alias.name for alias in node.names]
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", mixers.names())
def test_files_import_each_other_and_what_everybody_has(name, family):
    files = flatten(FAMILIES[family], [mixers.get(name)]).files
    for entry in FAMILIES[family].auto_map().values():
        run = imported_on_loading(files, entry.partition(".")[0])
        assert not any("triton" in file for file in run), "Triton is loaded where an op takes it"
    for file, text in files.items():
        assert "anymixer::" not in text, "an operator of another version's may be registered in the same process"
        for level, module, names in imports(text):
            if level:
                beside = [module] if module else names
                assert all(f"{other}.py" in files for other in beside), (file, module)
            else:
                assert module.partition(".")[0] in ALLOWED, (file, module)


def test_only_the_chosen_mixers_are_taken_along():
    files = flatten(BERT, [mixers.get("attention")]).files
    assert {name for name in files if name.startswith("mixers")} == {
        "mixers.py",
        "mixers_base.py",
        "mixers_plugins.py",
        "mixers_attention.py",
        "mixers_softmax_heads.py",
    }
    assert not any("quasiseparable" in name or "hydra" in name for name in files)
    both = flatten(BERT, [mixers.get("attention"), mixers.get("hydra"), mixers.get("attention")]).files
    assert {"mixers_attention.py", "mixers_hydra.py", "kernels_quasiseparable.py"} <= both.keys()


@pytest.mark.parametrize("entry", sorted({name.partition(".")[0] for name in BERT.auto_map().values()}))
def test_transformers_finds_every_file_from_the_one_that_is_named(entry, tmp_path):
    """transformers 4 copies the files that the named one imports itself, and follows circles for ever."""
    write_code(flatten(BERT, [mixers.get("hydra")]), tmp_path)
    named = tmp_path / f"{entry}.py"
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
        code = flatten(BERT, [mixers.get("my_mean")])
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
        flatten(BERT, [mixers.get("my_bad")])


def test_the_files_are_the_same_every_time():
    first, second = (flatten(BERT, [mixers.get("hydra")]).files for _ in range(2))
    assert first == second


def test_all_heads_stand_in_one_file_which_registers_them():
    text = flatten(BERT, [mixers.get("attention")]).files["modeling_mixer_bert.py"]
    defined = {node.name for node in ast.parse(text).body if isinstance(node, ast.ClassDef)}
    for auto, name in BERT.auto_map().items():
        home, _, cls = name.partition(".")
        if auto != "AutoConfig":
            assert home == "modeling_mixer_bert" and cls in defined
            assert f'{cls}.register_for_auto_class("{auto}")' in text.splitlines()


def test_modules_that_cannot_be_joined_are_told():
    with pytest.raises(ValueError, match="two definitions of f in a, b"):
        join_modules(['"""A."""\nimport os\ndef f(): pass\n', '"""B."""\nimport os\ndef f(): pass\n'], ["a", "b"])
    with pytest.raises(ValueError, match="something stands between the imports"):
        join_modules(['"""A."""\nimport os\nX = 1\nimport sys\n'], ["a"])
    joined = join_modules(
        ['"""A."""\nimport os\nX = 1\n', '"""B."""\nimport os\nfrom .a import X\nY = X\n'], ["a", "b"]
    )
    assert joined.count("import os") == 1 and "from" not in joined
    values = {}
    exec(joined, values)
    assert values["__doc__"] == "A." and values["Y"] == 1
