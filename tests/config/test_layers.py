"""`inherits:`, merging, and which layer is named for a key."""

from pathlib import Path

import pytest

from anymixer.config.layers import Layer, cleared, file_layers, lookup, merge, override_layer, source_of
from anymixer.errors import UserError

BY_NAME = frozenset({"model.mixer"})


def write(folder: Path, name: str, text: str) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def sources(layers: list[Layer]) -> list[str]:
    return [Path(layer.source).name for layer in layers]


def test_inherits_recursively_and_later_files_win(tmp_path):
    write(tmp_path, "_base/root.yaml", "a: root\nb: root\nc: root\nd: root\n")
    write(tmp_path, "_base/one.yaml", "inherits: root.yaml\nb: one\nc: one\nd: one\n")
    write(tmp_path, "_base/two.yaml", "c: two\nd: two\n")
    path = write(tmp_path, "runs/run.yaml", "inherits: [../_base/one.yaml, ../_base/two.yaml]\nd: run\n")
    layers = file_layers(path)
    assert sources(layers) == ["root.yaml", "one.yaml", "two.yaml", "run.yaml"]
    assert layers[0].source == str(tmp_path / "_base" / "root.yaml")
    assert merge(layers) == {"a": "root", "b": "one", "c": "two", "d": "run"}


def test_a_file_inherited_twice_is_no_cycle(tmp_path):
    write(tmp_path, "root.yaml", "a: 1\n")
    write(tmp_path, "one.yaml", "inherits: root.yaml\nb: 1\n")
    write(tmp_path, "two.yaml", "inherits: root.yaml\nc: 1\n")
    path = write(tmp_path, "run.yaml", "inherits: [one.yaml, two.yaml]\n")
    assert merge(file_layers(path)) == {"a": 1, "b": 1, "c": 1}


@pytest.mark.parametrize("inherits", ["run.yaml", "../x/run.yaml", "other.yaml"])
def test_cycle_is_shown(tmp_path, inherits):
    write(tmp_path, "x/other.yaml", "inherits: run.yaml\n")
    path = write(tmp_path, "x/run.yaml", f"inherits: {inherits}\n")
    with pytest.raises(UserError, match=r"inherits: a file inherits itself: .*run\.yaml -> .*run\.yaml$"):
        file_layers(path)


def test_missing_inherited_file_names_who_asked(tmp_path):
    write(tmp_path, "base.yaml", "a: 1\n")
    path = write(tmp_path, "run.yaml", "inherits: bass.yaml\n")
    with pytest.raises(UserError, match=r"run\.yaml: inherits: .*bass\.yaml: no such file; did you mean 'base"):
        file_layers(path)


@pytest.mark.parametrize("inherits", ["3", "[1]", "{a: b}", "", "['']"])
def test_inherits_is_a_name_or_a_list_of_names(tmp_path, inherits):
    path = write(tmp_path, "run.yaml", f"inherits: {inherits}\n")
    with pytest.raises(UserError, match=r"run\.yaml: inherits: expected a file name or a list"):
        file_layers(path)


@pytest.mark.parametrize(
    ("below", "above", "merged"),
    [
        ({"a": {"x": 1}}, {"a": {"y": 2}}, {"a": {"x": 1, "y": 2}}),
        ({"a": [1, 2, 3]}, {"a": [4]}, {"a": [4]}),
        ({"a": {"x": 1}}, {"a": None}, {"a": None}),
        ({"a": None}, {"a": {"x": 1}}, {"a": {"x": 1}}),
        ({"a": "${b}"}, {"a": {"x": 1}}, {"a": {"x": 1}}),
        # only a mapping listed by name is replaced, and only by one of another name
        ({"a": {"name": "p", "x": 1}}, {"a": {"name": "q"}}, {"a": {"name": "q", "x": 1}}),
        (
            {"model": {"mixer": {"name": "p", "x": 1}, "n": 1}},
            {"model": {"mixer": {"name": "q", "y": 2}}},
            {"model": {"mixer": {"name": "q", "y": 2}, "n": 1}},
        ),
        (
            {"model": {"mixer": {"name": "p", "x": 1}}},
            {"model": {"mixer": {"name": "p", "y": 2}}},
            {"model": {"mixer": {"name": "p", "x": 1, "y": 2}}},
        ),
        (
            {"model": {"mixer": {"name": "p", "x": 1}}},
            {"model": {"mixer": {"y": 2}}},
            {"model": {"mixer": {"name": "p", "x": 1, "y": 2}}},
        ),
        (
            {"model": {"mixer": "p"}},
            {"model": {"mixer": {"x": 2}}},
            {"model": {"mixer": {"name": "p", "x": 2}}},
        ),
        ({"model": {"mixer": "p"}}, {"model": {"mixer": {"name": "q"}}}, {"model": {"mixer": {"name": "q"}}}),
        ({"model": {"mixer": {"name": "p"}}}, {"model": {"mixer": "q"}}, {"model": {"mixer": "q"}}),
        (
            {"model": {"mixer": [{"name": "p"}]}},
            {"model": {"mixer": {"name": "q"}}},
            {"model": {"mixer": {"name": "q"}}},
        ),
    ],
)
def test_merging(below, above, merged):
    layers = [Layer("below", below), Layer("above", above)]
    assert merge(layers, BY_NAME) == merged


def test_merging_leaves_layers_as_they_were():
    layers = [Layer("below", {"a": {"x": 1}}), Layer("above", {"a": {"x": 2}})]
    merge(layers)
    assert layers[0].values == {"a": {"x": 1}}


def test_overrides_of_one_mixer_do_not_depend_on_their_order():
    files = [Layer("run.yaml", {"model": {"mixer": {"name": "hydra", "expand": 2}}})]
    for overrides in (
        ["model.mixer.name=ssd", "model.mixer.n=1"],
        ["model.mixer.n=1", "model.mixer.name=ssd"],
    ):
        layers = [*files, override_layer(overrides, files, BY_NAME)]
        assert merge(layers, BY_NAME) == {"model": {"mixer": {"name": "ssd", "n": 1}}}


def test_last_override_wins():
    files = [Layer("run.yaml", {"a": 1})]
    assert override_layer(["a=2", "b.c=1", "b.c=2", "a=3"], files, BY_NAME).values == {"a": 3, "b": {"c": 2}}


def test_the_command_line_cannot_inherit():
    with pytest.raises(UserError, match="command line: inherits: only a file inherits"):
        override_layer(["inherits=base.yaml"], [Layer("run.yaml", {})], BY_NAME)


def test_override_of_a_mixer_given_as_its_name():
    files = [Layer("run.yaml", {"model": {"mixer": "hydra"}})]
    layers = [*files, override_layer(["model.mixer.expand=4"], files, BY_NAME)]
    assert merge(layers, BY_NAME) == {"model": {"mixer": {"name": "hydra", "expand": 4}}}


@pytest.mark.parametrize(
    ("key", "held", "kind"), [("mixer", [{"name": "hydra"}], "a list"), ("loss", "plain", "one value")]
)
def test_override_through_a_list_or_a_value(key, held, kind):
    files = [Layer("run.yaml", {"model": {key: held}})]
    with pytest.raises(UserError) as error:
        override_layer([f"model.{key}.expand=4"], files, BY_NAME)
    assert str(error.value) == (
        f"command line: model.{key}.expand: model.{key} is {kind} in run.yaml; override model.{key} as a whole"
    )
    layer = override_layer([f"model.{key}={{name: hydra}}", f"model.{key}.expand=4"], files, BY_NAME)
    assert layer.values == {"model": {key: {"name": "hydra", "expand": 4}}}


def test_false_takes_an_entry_away_and_null_all_of_them():
    values = {
        "loggers": {"wandb": False, "file": None, "tb": {"flag": False}},
        "other": {"x": False},
        "none": None,
    }
    assert cleared(values, ["loggers", "none"]) == {
        "loggers": {"file": None, "tb": {"flag": False}},
        "other": {"x": False},
        "none": {},
    }


def test_source_of_a_key():
    layers = [Layer("base.yaml", {"a": {"x": 1, "y": [1]}, "b": 1}), Layer("run.yaml", {"a": {"z": 1}})]
    layers.append(Layer("command line", {"b": 2, "c": None}))
    keys = ("a.x", "a.y[0]", "a.z", "b", "c.d", "unset", "a.unset", "a.x.deeper", "")
    found = {key: source_of(key, layers) for key in keys}
    assert found == {
        "a.x": "base.yaml",
        "a.y[0]": "base.yaml",
        "a.z": "run.yaml",
        "b": "command line",
        "c.d": "command line",
        "unset": "run.yaml",
        "a.unset": "run.yaml",
        "a.x.deeper": "base.yaml",
        "": "run.yaml",
    }


def test_lookup():
    assert lookup({"a": {"b": 0}}, "a.b") == 0
    assert lookup({"a": {"b": 0}}, "a.c") is None
    assert lookup({"a": {"b": 0}}, "a.b.c") is None
