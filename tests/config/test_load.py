"""`load_config` on a small schema: order of layers, interpolation, conversion, errors that name a file."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
from omegaconf import MISSING

from anymixer.config import dump_config, load_config
from anymixer.config.base import ConfigSchema
from anymixer.errors import UserError


@dataclass(kw_only=True)
class Optimizer:
    lr: float = 1e-3
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])


@dataclass(kw_only=True)
class Data:
    local: str | None = None
    max_seq_len: int | None = None
    shuffle: bool = True


@dataclass(kw_only=True)
class Model:
    mixer: Any = None
    model_config: dict[str, Any] = field(default_factory=dict)


@dataclass(kw_only=True)
class Run(ConfigSchema):
    REFUSED: ClassVar[Mapping[str, str]] = {"data.keep_raw": "use cache_limit"}
    REPLACED_BY_NAME: ClassVar[frozenset[str]] = frozenset({"model.mixer"})

    run_name: str | None = None
    data_local: str | None = None
    max_seq_len: int = 128
    seed: int = 17
    batch: Any = "auto"
    note: str = MISSING
    optimizer: Optimizer = field(default_factory=Optimizer)
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    algorithms: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def unset_values(cls, layers: Mapping[str, Any], stem: str) -> Mapping[str, Any]:
        return {"run_name": stem, "data.local": "${data_local}", "data.max_seq_len": "${max_seq_len}"}

    def validate(self) -> None:
        if self.seed < 0:
            raise UserError(f"seed: {self.seed} is negative")


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def load(folder: Path, text: str, *overrides: str) -> Run:
    return load_config(write(folder, "note: x\n" + text), overrides, schema=Run)


def failure(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(UserError) as error:
        load(folder, text, *overrides)
    assert "\n" not in str(error.value)
    return str(error.value).replace(f"{folder}/", "")


def test_defaults_file_and_overrides(tmp_path):
    run = load(tmp_path, "optimizer: {lr: 5e-4}\nseed: 1\n", "seed=2", "algorithms.clip.threshold=1.0")
    assert isinstance(run.optimizer, Optimizer)
    assert (run.optimizer.lr, run.optimizer.betas) == (5e-4, [0.9, 0.98])
    assert run.seed == 2
    assert run.algorithms == {"clip": {"threshold": 1.0}}
    assert run.run_name == "run"


def test_values_become_the_type_of_their_field(tmp_path):
    run = load(tmp_path, "optimizer: {lr: 1, betas: [0, '0.5']}\nseed: '3'\nrun_name: 17\ndata: {shuffle: no}\n")
    assert (run.optimizer.lr, run.optimizer.betas) == (1.0, [0.0, 0.5])
    assert all(isinstance(value, float) for value in (run.optimizer.lr, *run.optimizer.betas))
    assert (run.seed, run.run_name, run.data.shuffle) == (3, "17", False)


def test_untyped_fields_keep_what_they_hold(tmp_path):
    run = load(tmp_path, "model: {mixer: [{name: hydra, expand: 2}, attention]}\nbatch: 16\n")
    assert run.model.mixer == [{"name": "hydra", "expand": 2}, "attention"]
    assert type(run.model.mixer) is list and type(run.model.mixer[0]) is dict
    assert run.batch == 16


def test_null_and_list_overrides(tmp_path):
    run = load(
        tmp_path,
        "data_local: here\noptimizer: {betas: [0.1, 0.2]}\n",
        "data_local=null",
        "optimizer.betas=[1,2]",
    )
    assert run.data_local is None
    assert run.optimizer.betas == [1.0, 2.0]


def test_override_inside_untyped_mapping(tmp_path):
    text = "model: {mixer: {name: hydra, expand: 2, d_state: 64}}\n"
    assert load(tmp_path, text, "model.mixer.expand=4").model.mixer == {
        "name": "hydra",
        "expand": 4,
        "d_state": 64,
    }
    assert load(tmp_path, text, "model.mixer.name=attention").model.mixer == {"name": "attention"}


def test_interpolation_across_layers(tmp_path):
    write(
        tmp_path,
        "max_seq_len: 64\ndata: {max_seq_len: '${max_seq_len}'}\nmodel: {model_config: {n: '${seed}'}}\n",
        "base.yaml",
    )
    run = load(tmp_path, "inherits: base.yaml\nmax_seq_len: 256\nrun_name: len-${data.max_seq_len}\n", "seed=5")
    assert run.data.max_seq_len == 256
    assert run.run_name == "len-256"
    assert run.model.model_config == {"n": 5}


def test_interpolation_reaches_defaults_and_unset_values(tmp_path):
    run = load(
        tmp_path,
        "data_local: here\nmodel: {model_config: {a: '${data.local}/${run_name}', b: '${optimizer.lr}'}}\n",
    )
    assert run.model.model_config == {"a": "here/run", "b": 1e-3}


def test_environment_variables(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_FOLDER", "/data")
    assert load(tmp_path, "data_local: ${oc.env:SOME_FOLDER}/c4\n").data.local == "/data/c4"
    assert load(tmp_path, "seed: ${oc.env:NOT_SET_AT_ALL,4}\n").seed == 4


def test_unset_values_fill_what_is_missing_or_null(tmp_path):
    run = load(tmp_path, "data_local: here\nrun_name:\ndata: {local: null, max_seq_len: 32}\n")
    assert (run.run_name, run.data.local, run.data.max_seq_len) == ("run", "here", 32)


def test_each_layer_is_named_for_its_own_mistake(tmp_path):
    write(tmp_path, "optimizer: {lrr: 1}\n", "base.yaml")
    assert failure(tmp_path, "inherits: base.yaml\n") == ("base.yaml: optimizer.lrr: unknown key; did you mean 'lr'?")
    write(tmp_path, "seed: 1\n", "base.yaml")
    text = "inherits: base.yaml\n"
    assert failure(tmp_path, text + "sed: 1\n") == "run.yaml: sed: unknown key; did you mean 'seed'?"
    assert failure(tmp_path, text, "sed=1") == "command line: sed: unknown key; did you mean 'seed'?"
    assert failure(tmp_path, text, "seed=one") == "command line: seed: expected a whole number, got 'one'"
    assert failure(tmp_path, text, "data.keep_raw=true") == (
        "command line: data.keep_raw: not supported: use cache_limit"
    )


def test_a_mistake_that_a_stronger_layer_hides_is_still_told(tmp_path):
    write(tmp_path, "seed: one\n", "base.yaml")
    assert failure(tmp_path, "inherits: base.yaml\nseed: 1\n").startswith("base.yaml: seed: expected")


def test_validation_names_the_layer_that_decided(tmp_path):
    write(tmp_path, "seed: -1\n", "base.yaml")
    assert failure(tmp_path, "inherits: base.yaml\n") == "base.yaml: seed: -1 is negative"
    assert failure(tmp_path, "seed: -2\n") == "run.yaml: seed: -2 is negative"
    assert failure(tmp_path, "seed: 1\n", "seed=-3") == "command line: seed: -3 is negative"


def test_further_checks_are_named_likewise(tmp_path):
    def check(run: Run) -> None:
        if "clip" in run.algorithms:
            raise UserError("algorithms.clip: unknown name")

    assert load_config(write(tmp_path, "note: x\n"), schema=Run, checks=[check]).note == "x"
    with pytest.raises(UserError, match=r"^command line: algorithms\.clip: unknown name$"):
        load_config(write(tmp_path, "note: x\n"), ["algorithms.clip.norm=1"], Run, [check])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: ${sed}\n", "seed: '${sed}' names a key that does not exist; did you mean 'seed'?"),
        ("optimizer: {lr: '${optimizer.lrr}'}\n", "optimizer.lr: '${optimizer.lrr}' names a key that"),
        ("algorithms: {a: [1, {b: '${zzzz}'}]}\n", "algorithms.a[1].b: an interpolation names a key that"),
        (
            "data: {local: '${.locl}'}\n",
            "data.local: '${.locl}' names a key that does not exist; did you mean 'data.local'?",
        ),
        ("seed: ${run_name}\n", "seed: expected a whole number, got 'run'"),
        ("seed: ${data_local}\n", "seed: expected a whole number, got null"),
        ("optimizer: ${batch}\n", "optimizer: expected a mapping (key: value), got 'auto'"),
        ("optimizer: ${model}\n", "optimizer.mixer: unknown key; did you mean 'model.mixer'?"),
        (
            "seed: ${max_seq_len}\nmax_seq_len: ${seed}\n",
            "max_seq_len: '${seed}' cannot be resolved: Recursive",
        ),
        ("seed: ${nope:1}\n", "seed: '${nope:1}' cannot be resolved: Unsupported interpolation type nope"),
        ("seed: ${oc.env:NOT_SET_AT_ALL}\n", "seed: '${oc.env:NOT_SET_AT_ALL}' cannot be resolved: "),
        ("seed: ???\n", "seed: must be set; no file and no override gives it a value"),
    ],
)
def test_interpolations_that_lead_nowhere(tmp_path, text, message):
    assert failure(tmp_path, text).startswith(f"run.yaml: {message}")


def test_a_key_without_default_must_be_set(tmp_path):
    with pytest.raises(UserError, match=r"run\.yaml: note: must be set"):
        load_config(write(tmp_path, "seed: 1\n"), schema=Run)
    assert load_config(write(tmp_path, "seed: 1\n"), ["note=hello"], schema=Run).note == "hello"


def test_the_path_may_be_text(tmp_path):
    assert load_config(str(write(tmp_path, "note: x\n")), schema=Run).note == "x"


@pytest.mark.parametrize(
    "value", ["1e-5", "no", "007", "null", "${seed}", "\\${seed}", "a\\", "x: y", "héé", "two\nlines"]
)
def test_dump_reads_back_equal(tmp_path, value):
    run = load(tmp_path, "data_local: here\noptimizer: {lr: 1e-5}\nmodel: {mixer: {name: hydra}}\n")
    run.note = value
    run.algorithms = {"a": {"b": [value, 1e-7, None, {}]}}
    dumped = dump_config(run)
    assert load_config(write(tmp_path, dumped, "resolved.yaml"), schema=Run) == run
    assert "optimizer:\n  lr: 1.0e-05\n" in dumped
