"""Every YAML file of the repository loads, builds on the meta device, and is the size it says."""

from pathlib import Path

import pytest

from anymixer.config import GlueConfig, load_config
from anymixer.config.layers import file_layers
from anymixer.describe import build_on_meta, count_parameters
from anymixer.training import check_tables

ROOT = Path(__file__).parents[1]
FILES = sorted(path for path in (ROOT / "yamls").rglob("*.yaml") if path.parent.name != "_base")
FINETUNING = [path for path in FILES if "finetune" in path.parts or path.stem == "glue"]
PRETRAINING = [path for path in FILES if path not in FINETUNING]
PARAMETERS = {
    "pretrain/hydra": 112_086_712,
    "pretrain/bert": 109_518_912,
    "pretrain/hf_bert": 109_518_912,
    "pretrain/mosaic_bert": 137_400_384,
}
# What the paper's own code comes to, in millions (vandermonde_di: by its equations; the code trains the transform).
PAPER_MILLIONS = {
    "dense": 69.1,
    "toeplitz_di": 71.4,
    "toeplitz_dd": 71.9,
    "vandermonde_dft": 71.4,
    "vandermonde_di": 71.4,
    "vandermonde_dd": 70.3,
    "cauchy_di": 71.4,
    "cauchy_dd": 70.3,
    "low_rank_di": 71.4,
    "low_rank_dd": 70.3,
    "attention_di": 71.4,
    "attention_dd": 70.3,
    "quasiseparable_di": 71.9,
    "quasiseparable_dd": 70.7,
}


def name_of(path):
    return str(path.relative_to(ROOT / "yamls").with_suffix(""))


@pytest.mark.parametrize("path", FINETUNING, ids=name_of)
def test_finetuning_loads(path):
    config = load_config(path, schema=GlueConfig)
    assert config.tasks and config.starting_checkpoint_load_path


def test_every_pretrained_model_can_be_finetuned():
    pretrained = {name_of(path).removeprefix("pretrain/") for path in PRETRAINING if "pretrain" in path.parts}
    assert pretrained == {name_of(path).removeprefix("finetune/") for path in FINETUNING if "finetune" in path.parts}


@pytest.mark.parametrize("path", PRETRAINING, ids=name_of)
def test_loads_and_builds(path):
    config = load_config(path, checks=[check_tables])
    model = build_on_meta(config)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    expected = PARAMETERS.get(name_of(path))
    if expected is not None:
        assert count_parameters(model) == expected
    if path.parent.name == "matrix":
        assert count_parameters(model) == pytest.approx(1e6 * PAPER_MILLIONS[path.stem], rel=0.01)
        assert (config.max_duration, config.global_train_batch_size, config.max_seq_len) == ("98304000sp", 4096, 128)


def test_every_base_file_is_inherited_by_a_run():
    used = {Path(layer.source).resolve() for path in FILES for layer in file_layers(path)}
    assert {p.resolve() for p in (ROOT / "yamls" / "_base").glob("*.yaml")} <= used


def test_the_table_of_the_readme_lists_every_file():
    readme = (ROOT / "README.md").read_text()
    missing = [
        name_of(path)
        for path in FILES
        if f"yamls/{name_of(path)}.yaml" not in readme
        and f"`yamls/{path.parent.relative_to(ROOT / 'yamls')}/`" not in readme
    ]
    assert missing == []


def test_every_matrix_mixer_has_a_recipe():
    assert {path.stem for path in PRETRAINING if path.parent.name == "matrix"} == set(PAPER_MILLIONS)
