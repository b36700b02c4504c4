"""One file, or one override, to plain values; and what is said about those that cannot be read."""

from pathlib import Path

import pytest

from anymixer.config.read import read_overrides, read_yaml
from anymixer.errors import UserError


def write(folder: Path, text: str | bytes, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_numbers_text_and_nothing(tmp_path):
    text = "lr: 5e-4\nwd: 1e-5\nmax_duration: 286720000sp\ndata_remote:\nseed: 1_000\nname: ${seed}\n"
    assert read_yaml(write(tmp_path, text)) == {
        "lr": 5e-4,
        "wd": 1e-5,
        "max_duration": "286720000sp",
        "data_remote": None,
        "seed": 1000,
        "name": "${seed}",
    }


def test_byte_order_mark_and_anchors(tmp_path):
    text = "\ufeffbase: &b {x: 1}\nother: {<<: *b, y: 2}\n"
    assert read_yaml(write(tmp_path, text)) == {"base": {"x": 1}, "other": {"x": 1, "y": 2}}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "the file is empty"),
        ("# only a comment\n", "the file is empty"),
        ("- 1\n- 2\n", "holds a list where"),
        ("just words\n", "holds plain text where"),
        ("a:\n\tb: 1\n", "line 2: a tab character; YAML is indented with spaces"),
        ("a: [1\n", "line 2: "),
        ("a: 1\n---\nb: 2\n", "line 2: a second YAML document"),
        ("a: !!python/object:os.system x\n", "line 1: could not determine a constructor"),
        ("a: &x [*x]\n", "line 1: YAML recursive aliases are not supported"),
        ("seed: 1\nlr: 2\nseed: 3\n", "seed: given twice, in lines 1 and 3"),
        ("o:\n  lr: 1\n  betas: [{x: 1, x: 2}]\n", "o.betas[0].x: given twice, in lines 3 and 3"),
        ("a:\n  b: 1\na:\n  c: 1\n", "a: given twice, in lines 1 and 3"),
        ("o:\n  lr: ${x\n", "o.lr: cannot read the ${...} in it"),
        (b"name: caf\xe9\n", "is not UTF-8 text (byte 9)"),
        (b"a: \x00\n", "special characters are not allowed"),
    ],
)
def test_bad_file_is_one_line_that_names_it(tmp_path, text, problem):
    path = write(tmp_path, text)
    with pytest.raises(UserError) as error:
        read_yaml(path)
    assert str(error.value).startswith(f"{path}: ")
    assert problem in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file_suggests_its_neighbour(tmp_path):
    write(tmp_path, "a: 1", "hydra.yaml")
    with pytest.raises(UserError, match=r"hidra\.yaml: no such file; did you mean 'hydra\.yaml'\?"):
        read_yaml(tmp_path / "hidra.yaml")
    with pytest.raises(UserError, match=r"run: inherits: .*/gone/x\.yaml: no such file$"):
        read_yaml(tmp_path / "gone" / "x.yaml", named_by="run: inherits")


def test_folder_instead_of_file(tmp_path):
    with pytest.raises(UserError, match="is a folder; name a YAML file"):
        read_yaml(tmp_path)


def test_a_file_used_as_a_folder(tmp_path):
    with pytest.raises(UserError, match=r"x\.yaml: cannot be read \(Not a directory\)"):
        read_yaml(write(tmp_path, "a: 1") / "x.yaml")


@pytest.mark.parametrize(
    ("override", "values"),
    [
        ("optimizer.lr=5e-4", {"optimizer": {"lr": 5e-4}}),
        ("load_path=null", {"load_path": None}),
        ("optimizer.betas=[0.9, 0.95]", {"optimizer": {"betas": [0.9, 0.95]}}),
        ("model.mixer={name: hydra, expand: 4}", {"model": {"mixer": {"name": "hydra", "expand": 4}}}),
        ("max_duration=286720000sp", {"max_duration": "286720000sp"}),
        ("load_path=a=b.pt", {"load_path": "a=b.pt"}),
        ("run_name='1e5'", {"run_name": "1e5"}),
        ("data_local=${oc.env:HOME}/data", {"data_local": "${oc.env:HOME}/data"}),
        (" seed = 3 ", {"seed": 3}),
    ],
)
def test_override_values_are_yaml(override, values):
    assert read_overrides([override])[0][1] == values


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("seed", "seed: an override is written key.sub=value"),
        ("=3", "an override is written key.sub=value"),
        ("--seed=3", "overrides have no dashes; write seed=3"),
        ("save_folder=", "save_folder: no value after '='; write save_folder=null to unset it"),
        ("a..b=1", "a..b: not a key path"),
        ("optimizer.betas[0]=1", "a list is given whole"),
        ("a=[1", "a: cannot read '[1' as a YAML value"),
        ("a=@x", "a: cannot read '@x' as a YAML value"),
        ("a={b: ${c}}", "put text in quotes"),
        ("a=${b", "a: cannot read"),
    ],
)
def test_bad_override_is_one_line_that_names_it(override, problem):
    with pytest.raises(UserError) as error:
        read_overrides([override])
    assert str(error.value).startswith("command line: ")
    assert problem in str(error.value)
    assert "\n" not in str(error.value)
