"""Every kind of field against right and wrong values; messages give source, key path and what is known."""

from dataclasses import dataclass, field
from typing import Any, Optional, Union

import pytest

from anymixer.config.check import check_values, known_keys
from anymixer.errors import UserError


@dataclass
class Stream:
    local: str | None = None
    proportion: float | None = None


@dataclass
class Data:
    local: str | None = None
    shuffle: bool = True
    streams: dict[str, Stream] | None = None


@dataclass
class Optimizer:
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.98)


@dataclass
class Run:
    seed: int = 17
    name: str = "run"
    note: Optional[str] = None  # noqa: UP045 - both spellings must work
    batch: Union[int, str] = "auto"  # noqa: UP007
    anything: Any = None
    steps: list[int] = field(default_factory=list)
    algorithms: dict[str, Any] = field(default_factory=dict)
    optimizer: Optimizer = field(default_factory=Optimizer)
    train_data: Data = field(default_factory=Data)
    eval_data: Data | None = None


REFUSED = {
    "*_data.keep_raw": "use cache_limit",
    "anything.kind=old": "write new",
    "algorithms.fused": "gone",
}


def check(values):
    check_values(values, Run, lambda key: "run.yaml", REFUSED)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"seed": 3, "name": "x", "note": None, "batch": 128},
        {"seed": "3", "name": 17, "note": 17, "batch": "auto"},
        {"anything": None},
        {"anything": [1, {"a": 2}]},
        {"anything": {"kind": "new"}},
        {"steps": []},
        {"steps": [1, 2]},
        {"algorithms": {"gradient_clipping": {"clipping_threshold": 1.0}}},
        {"algorithms": {"low_precision_layernorm": None}},
        {"optimizer": {"lr": 1, "betas": [0.9, 0.98]}},
        {"optimizer": {"lr": "5e-4", "betas": (0.9, "0.98")}},
        {"train_data": {"streams": {"c4": {"local": "x", "proportion": 0.5}, "books": {}}}},
        {"train_data": {"streams": None}, "eval_data": None},
        {"eval_data": {"shuffle": "false"}},
        {"seed": "${other}", "optimizer": "${other}", "steps": "${steps}", "note": "a ${b}"},
        {"seed": "???", "optimizer": "???"},
    ],
)
def test_accepted(values):
    check(values)


def test_what_looks_like_an_interpolation_is_text_once_resolved():
    check_values({"note": "${seed}", "anything": "${seed}"}, Run, str, resolved=True)
    with pytest.raises(UserError, match=r"seed: expected a whole number, got '\$\{seed\}'"):
        check_values({"seed": "${seed}"}, Run, str, resolved=True)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sed": 3}, "sed: unknown key; did you mean 'seed'?"),
        ({"train_data": {"shufle": True}}, "train_data.shufle: unknown key; did you mean 'shuffle'?"),
        (
            {"train_data": {"streams": {"c4": {"locl": 1}}}},
            "train_data.streams.c4.locl: unknown key; did you mean 'local'?",
        ),
        ({"lr": 1e-3}, "lr: unknown key; did you mean 'optimizer.lr'?"),
        (
            {"optimizer": {"zzz": 1}},
            "optimizer.zzz: unknown key; the keys of optimizer are lr, betas",
        ),
        ({3: 1}, "3: the key 3 is not text to YAML; put it in quotes"),
        ({"algorithms": {True: 1}}, "algorithms.True: the key True is not text to YAML; put it in quotes"),
        ({"seed": "3x"}, "seed: expected a whole number, got '3x'"),
        ({"seed": 3.5}, "seed: expected a whole number, got 3.5"),
        ({"seed": True}, "seed: expected a whole number, got true"),
        ({"seed": None}, "seed: expected a whole number, got null"),
        ({"seed": [1]}, "seed: expected a whole number, got a list"),
        ({"name": False}, "name: expected text, got false; put it in quotes"),
        ({"name": 1e5}, "name: expected text, got 100000.0; put it in quotes"),
        ({"note": {"a": 1}}, "note: expected text or null, got a mapping"),
        ({"batch": 1.5}, "batch: expected a whole number or text, got 1.5"),
        ({"batch": None}, "batch: expected a whole number or text, got null"),
        ({"steps": 3}, "steps: expected a list, got 3"),
        ({"steps": [1, "x"]}, "steps[1]: expected a whole number, got 'x'"),
        ({"algorithms": 3}, "algorithms: expected a mapping (key: value), got 3"),
        ({"algorithms": None}, "algorithms: expected a mapping (key: value), got null"),
        ({"optimizer": 3}, "optimizer: expected a mapping (key: value), got 3"),
        ({"optimizer": None}, "optimizer: expected a mapping (key: value), got null"),
        ({"optimizer": {"lr": "fast"}}, "optimizer.lr: expected a number, got 'fast'"),
        ({"optimizer": {"betas": [0.9]}}, "optimizer.betas: expected a list of 2 items, got 1 items"),
        ({"optimizer": {"betas": "x"}}, "optimizer.betas: expected a list of 2 items, got 'x'"),
        ({"train_data": {"shuffle": 7}}, "train_data.shuffle: expected true or false, got 7"),
        ({"train_data": {"shuffle": "maybe"}}, "train_data.shuffle: expected true or false, got 'maybe'"),
        (
            {"train_data": {"streams": 3}},
            "train_data.streams: expected a mapping (key: value) or null, got 3",
        ),
        ({"train_data": {"streams": {"c4": None}}}, "train_data.streams.c4: expected a mapping"),
        ({"eval_data": 3}, "eval_data: expected a mapping (key: value) or null, got 3"),
        ({"train_data": {"keep_raw": True}}, "train_data.keep_raw: not supported: use cache_limit"),
        ({"anything": {"kind": "old"}}, "anything.kind: 'old' is not supported: write new"),
        ({"anything": [{"kind": "old"}, {5: 1}]}, "anything[1].5: the key 5 is not text"),
        ({"algorithms": {"fused": {}}}, "algorithms.fused: not supported: gone"),
    ],
)
def test_refused(values, message):
    with pytest.raises(UserError) as error:
        check(values)
    assert str(error.value).startswith(f"run.yaml: {message}")
    assert "\n" not in str(error.value)


def test_known_keys_lists_sections_before_what_is_in_them():
    keys = list(known_keys(Run))
    assert keys[:2] == ["seed", "name"]
    assert keys.index("optimizer") + 1 == keys.index("optimizer.lr")
    assert "eval_data.shuffle" in keys
