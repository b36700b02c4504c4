"""Mixers from outside the package: the documents' example trains, is remembered and listed; mistakes are one line."""

import re
import sys
from pathlib import Path

import pytest
import torch

from anymixer.config import load_config
from anymixer.errors import UserError
from anymixer.fill_mask import load_run
from anymixer.mixers import build_mixer, mixers, plugins
from anymixer.mixers.contract import check_contract

pytestmark = pytest.mark.usefixtures("forget_own_mixers")
ROOT = Path(__file__).parents[2]
(EXAMPLE,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/adding_a_mixer.md").read_text(), flags=re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with the example in it."""
    (tmp_path / "my_mixer.py").write_text(EXAMPLE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def error_of(spec):
    with pytest.raises(UserError) as caught:
        build_mixer(spec, 8, path="model.mixer")
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_example_is_25_lines():
    assert len(EXAMPLE.splitlines()) <= 25


def test_the_example_trains_resumes_and_loads_from_another_folder(
    folder, write_run, call_main, call_cli, monkeypatch, capsys
):
    file = write_run(folder, "mean", mixer="{name: mean, module: my_mixer.py, bias: false}")
    assert call_main(file, "max_duration=2ba") == 0
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert call_main(folder / "mean" / "config.yaml", "max_duration=4ba") == 0
    assert "continuing from" in capsys.readouterr().out
    model, _, config = load_run(folder / "mean")
    assert config.model.mixer["module"] == str(folder / "my_mixer.py")
    assert [type(layer.sequence.mixer).__name__ for layer in model.bert.backbone.layers] == ["Mean", "Mean"]
    assert call_cli("fill-mask", folder / "mean", "the old [MASK] sees") == 0


def test_a_list_of_layers_may_name_several_files(folder):
    (folder / "other.py").write_text(EXAMPLE.replace('"mean"', '"mean2"'))
    config = load_config(
        ROOT / "yamls/demo/hydra.yaml",
        ["model.mixer=[{name: mean, module: my_mixer.py}, hydra, {name: mean2, module: other.py}]"],
    )
    assert plugins.module_files(config.model.mixer) == [folder / "my_mixer.py", folder / "other.py"]
    assert plugins.absolute_modules(config.model.mixer)[2]["module"] == str(folder / "other.py")


def test_loading_twice_is_harmless_by_any_spelling(folder):
    first = build_mixer({"name": "mean", "module": "my_mixer.py"}, 8)
    again = build_mixer({"name": "mean", "module": str(folder / "my_mixer.py")}, 8)
    assert type(first) is type(again)
    assert first(torch.randn(1, 3, 8)).shape == (1, 3, 8)


def test_a_module_is_found_by_its_name_in_the_current_folder(folder):
    (folder / "my_package").mkdir()
    (folder / "my_package/__init__.py").write_text("from my_package.inner import Mean")
    (folder / "my_package/inner.py").write_text(EXAMPLE)
    assert type(build_mixer({"name": "mean", "module": "my_package"}, 8)).__module__ == "my_package.inner"
    assert str(folder) not in sys.path


@pytest.mark.parametrize(
    ("content", "spec", "message"),
    [
        ("", {"module": "my_mixr.py"}, "model.mixer.module: no such file: my_mixr.py"),
        ("", {"module": "my_mixr.py"}, "did you mean 'my_mixer.py'?"),
        ("", {"module": 3}, "model.mixer.module: 3 is neither a file"),
        ("", {"module": "my_nothing.at_all"}, "model.mixer.module: my_nothing.at_all: cannot be imported: ModuleNotF"),
        ("x = 1\ny = z\n", {}, "my_mixer.py, line 2: cannot be imported: NameError: name 'z' is not defined"),
        ("x = (\n", {}, "my_mixer.py, line 1: cannot be imported: SyntaxError"),
        ("raise SystemExit(3)", {}, "my_mixer.py, line 1: cannot be imported: SystemExit: 3"),
        (EXAMPLE + "\n1 / 0", {}, "cannot be imported: ZeroDivisionError"),
        (
            EXAMPLE,
            {"name": "meen"},
            "model.mixer.name: my_mixer.py registers no mixer 'meen' (it registers: mean); did",
        ),
        (EXAMPLE, {"name": "hydra"}, "remove `module` to take the one that comes with anymixer"),
        ("x = 1", {}, 'it registers: no mixer; is its class under @register_mixer("mean")?'),
        (EXAMPLE, {"bais": False}, "model.mixer.bais: unknown key; did you mean 'bias'?"),
        (
            EXAMPLE.replace('"mean"', '"hydra"'),
            {"name": "hydra"},
            "line 5: cannot be imported: ValueError: mixer 'hydra' is already registered by anymixer.mixers.hydra.H",
        ),
        (EXAMPLE.replace("(SequenceMixer):", "(nn.Module):", 1), {}, "Mean is no subclass of SequenceMixer"),
    ],
)
def test_mistakes_are_one_line(folder, content, spec, message):
    (folder / "my_mixer.py").write_text(content)
    names = mixers.names()
    assert message in error_of({"name": "mean", "module": "my_mixer.py"} | spec)
    assert mixers.names() == names or content.startswith(EXAMPLE)


def test_what_fails_to_import_leaves_nothing_and_may_be_mended(folder):
    (folder / "my_mixer.py").write_text(EXAMPLE + "\n1 / 0")
    error_of({"name": "mean", "module": "my_mixer.py"})
    assert "mean" not in mixers.names()
    (folder / "my_mixer.py").write_text(EXAMPLE + "\n# mended by now")
    build_mixer({"name": "mean", "module": "my_mixer.py"}, 8)


@pytest.fixture
def installed(folder, monkeypatch):
    """A package `my_installed` that offers `mean` and a broken mixer to all who install it."""
    (folder / "my_installed.py").write_text(EXAMPLE)
    metadata = folder / "my_installed-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: my-installed\nVersion: 1.0\n")
    points = "mean = my_installed:Mean\nbroken = my_missing\nhydra = my_installed\n"
    (metadata / "entry_points.txt").write_text(f"[anymixer.mixers]\n{points}")
    monkeypatch.syspath_prepend(str(folder))


def test_an_installed_package_s_mixer_needs_its_name_alone(installed):
    assert type(build_mixer("mean", 8)).__module__ == "my_installed"


def test_an_unknown_name_lists_what_is_installed(installed):
    assert "did you mean 'mean'? (known: " in error_of("meam")


def test_a_broken_package_is_named(installed):
    assert error_of({"name": "broken"}).startswith(
        "model.mixer.name: 'broken' of my-installed (my_missing): cannot be imported: ModuleNotFoundError"
    )


def test_all_are_listed_with_their_origin(installed, folder, call_cli, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "250")
    (folder / "own.py").write_text(EXAMPLE.replace('"mean"', '"own"'))
    assert call_cli("mixers", "--module", "own.py") == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {cells[1].strip(): cells for cells in (re.split("[│┃]", line) for line in lines) if len(cells) > 5}
    assert [rows[name][5].strip() for name in ("hydra", "mean", "own")] == ["anymixer", "my_installed", "own.py"]
    left_out = [line for line in lines if line.startswith("left out: ")]
    assert len(left_out) == 2 and "my_missing" in left_out[0] and "'hydra' comes with anymixer" in left_out[1]


def test_the_example_keeps_the_contract(folder, call_cli, capsys):
    assert call_cli("mixers", "--module", "my_mixer.py", "--check") == 0
    out = capsys.readouterr().out
    assert out.startswith("mean (my_mixer.py)\n") and out.count("  ok ") == 6 and "BROKEN" not in out


@pytest.mark.parametrize(
    ("kept", "instead", "promise"),
    [
        ("return mixed[:, 0]", "return mixed[:, 0, :, :5]", "the output has the input's shape: (2, 1, 5) for"),
        ("self.in_proj(hidden_states)[", "self.in_proj(hidden_states).detach()[", "finite gradient: "),
        ("self.matrix(hidden_states, packing) @", "2 * self.matrix(hidden_states, packing) @", "@ values): a relative"),
        ("& (ids >= 0)[:, None, :]", "| (ids < 9)[:, None, :]", "padding changes nothing: a relative error of"),
        (
            "(ids[:, :, None] == ids[:, None, :])",
            "(ids[:, :, None] < 9)",
            "packed row change nothing: a relative error",
        ),
        ("return self.in_proj", "return self.out_proj", "has no attribute 'out_proj'"),
    ],
)
def test_a_broken_promise_is_named(folder, call_cli, capsys, kept, instead, promise):
    assert kept in EXAMPLE
    (folder / "my_mixer.py").write_text(EXAMPLE.replace(kept, instead))
    assert call_cli("mixers", "--module", "my_mixer.py", "--check") == 2
    captured = capsys.readouterr()
    assert any(promise in line for line in captured.out.splitlines() if line.startswith("  BROKEN "))
    assert "broken" in captured.err


def test_there_is_nothing_to_check_without_a_module(call_cli, capsys):
    assert call_cli("mixers", "--check") == 2
    assert "--check: nothing to check" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["hydra", "attention"])
def test_shipped_mixers_keep_what_is_asked_of_a_user_s(name):
    assert set(check_contract(name).values()) == {None}
