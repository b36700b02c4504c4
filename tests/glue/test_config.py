"""Keys of a GLUE run: the recipes as published, older programs' keys, and mistakes named before any work."""

from pathlib import Path

import pytest

from anymixer.config import GlueConfig, dump_config, load_config
from anymixer.errors import UserError

ROOT = Path(__file__).parents[2]
FINETUNE = ROOT / "yamls" / "finetune"
# Learning rate, weight decay, epochs, batch and evaluation interval of each published recipe.
BATCHES = {
    "mnli": (48, "2300ba"),
    "qnli": (16, "1000ba"),
    "qqp": (16, "2000ba"),
    "sst2": (16, "500ba"),
    "cola": (32, "250ba"),
    "rte": (16, "100ba"),
    "mrpc": (32, "100ba"),
    "stsb": (32, "200ba"),
}
MOSAIC = {
    "mnli": (5e-5, 5e-6, "3ep"),
    "qnli": (1e-5, 1e-6, "10ep"),
    "qqp": (3e-5, 3e-6, "5ep"),
    "sst2": (3e-5, 3e-6, "3ep"),
    "cola": (5e-5, 5e-6, "10ep"),
    "rte": (1e-5, 1e-5, "3ep"),
    "mrpc": (8e-5, 8e-6, "10ep"),
    "stsb": (3e-5, 3e-6, "10ep"),
}
HYDRA = MOSAIC | {
    "mnli": (1e-4, 5e-6, "2ep"),
    "qnli": (5e-5, 1e-6, "7ep"),
    "qqp": (5e-5, 3e-6, "3ep"),
    "rte": (1e-5, 1e-6, "3ep"),
    "sst2": (5e-5, 3e-6, "2ep"),
    "cola": (1e-4, 5e-6, "10ep"),
}
# A file as MosaicBERT ships it, less what is refused.
MOSAIC_FILE = """
parallel: true
base_run_name: mosaicbert-base
default_seed: 19
precision: auto
tokenizer_name: bert-base-uncased
model:
  name: hf_bert
  use_pretrained: true
  pretrained_model_name: bert-base-uncased
  tokenizer_name: ${tokenizer_name}
starting_checkpoint_load_path:
local_pretrain_checkpoint_folder: ./local-bert-checkpoints/
save_finetune_checkpoint_prefix: ./local-finetune-checkpoints/
save_finetune_checkpoint_folder: ${save_finetune_checkpoint_prefix}/${base_run_name}
callbacks: {lr_monitor: {}, speed_monitor: {}}
scheduler: {name: linear_decay_with_warmup, t_warmup: 0.06dur, alpha_f: 0.0}
algorithms: {low_precision_layernorm: {}}
"""


def load(overrides=(), file=FINETUNE / "hydra.yaml"):
    return load_config(file, overrides, schema=GlueConfig)


@pytest.mark.parametrize(("file", "recipe"), [("mosaic_bert.yaml", MOSAIC), ("hydra.yaml", HYDRA)])
def test_recipes_are_as_published(file, recipe):
    config = load(file=FINETUNE / file)
    found = {name: config.task(name).trainer_kwargs for name in recipe}
    assert {name: (t.lr, t.weight_decay, t.max_duration) for name, t in found.items()} == recipe
    assert {name: (t.batch_size, t.eval_interval) for name, t in found.items()} == BATCHES
    assert (config.optimizer.name, config.optimizer.betas, config.optimizer.eps) == (
        "decoupled_adamw",
        [0.9, 0.98],
        1e-6,
    )
    assert (config.max_seq_len, config.select, config.pooling) == (256, "last", "cls")
    assert (config.scheduler.t_warmup, config.scheduler.alpha_f) == ("0.06dur", 0.0)
    assert found["stsb"].precision == "fp32" and found["cola"].precision is None
    assert [name for name in config.tasks if config.starts_from_mnli(name)] == ["rte", "mrpc", "stsb"]


def test_seeds_of_the_recipes():
    mosaic, hydra = load(file=FINETUNE / "mosaic_bert.yaml"), load()
    assert mosaic.seeds("rte") == [19, 8364, 717, 10536, 90166]
    assert [len(mosaic.seeds(name)) for name in ("mnli", "qnli", "qqp", "sst2", "cola")] == [1, 1, 1, 3, 4]
    assert len(set(hydra.seeds("mnli"))) == 5 and hydra.seeds("mnli") == hydra.seeds("rte") == load().seeds("rte")
    assert load(["num_task_run=3"]).seeds("cola") == hydra.seeds("cola")[:3]
    assert load(["default_seed=7", "num_task_run=1"]).seeds("cola") == [7]


def test_every_pretraining_file_has_a_finetuning_file():
    pretrain = {path.relative_to(ROOT / "yamls/pretrain") for path in (ROOT / "yamls/pretrain").rglob("*.yaml")}
    assert {path.relative_to(FINETUNE) for path in FINETUNE.rglob("*.yaml")} == pretrain


def test_a_file_of_mosaicbert_means_what_it_meant(tmp_path):
    file = tmp_path / "mosaic.yaml"
    base = (ROOT / "yamls/_base/glue_mosaic.yaml").read_text().partition("tasks:")[2]
    file.write_text(f"inherits: {ROOT}/yamls/_base/glue.yaml\n{MOSAIC_FILE}\ntasks:{base}")
    config = load(file=file)
    assert config.starting_point() == "bert-base-uncased"
    assert config.save_finetune_checkpoint_folder == "./local-finetune-checkpoints//mosaicbert-base"
    assert (config.base_run_name, config.parallel) == ("mosaicbert-base", True)
    assert list(config.callbacks) == ["lr_monitor", "speed_monitor"]


def test_what_is_dumped_loads_as_it_was(tmp_path):
    config = load(["sweep.lr=[1e-5, 3e-5]", "early_stopping.patience=2", "tasks.wnli=false"])
    (tmp_path / "config.yaml").write_text(dump_config(config))
    assert load(file=tmp_path / "config.yaml") == config
    assert "wnli" not in config.tasks


def test_names_are_filled_in(monkeypatch):
    monkeypatch.delenv("COMPOSER_RUN_NAME", raising=False)
    assert load().save_finetune_checkpoint_folder == "runs/glue/hydra"
    assert load(["save_finetune_checkpoint_prefix=/x/", "base_run_name=y"]).save_finetune_checkpoint_folder == "/x/y"
    monkeypatch.setenv("COMPOSER_RUN_NAME", "named")
    assert load().base_run_name == "named"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("task_name=rte", "task_name: not supported"),
        ("tasks.rte.trainer_kwargs.wd=1", "tasks.rte.trainer_kwargs.wd: not supported: write weight_decay"),
        ("tasks.rte.trainer_kwargs.pool_all=true", "set pooling: mean"),
        ("tasks.rte.trainer_kwargs.optim_name=x", "set optimizer.name"),
        ("tasks.rte.trainer_kwargs.max_duratio=1ep", "unknown key; did you mean 'max_duration'"),
        ("tasks.rtee={}", "tasks.rtee: unknown task; did you mean 'rte'"),
        ("tasks.rtee=false", "tasks.rtee: unknown task; did you mean 'rte'"),
        ("tasks.ax={}", "the mnli job predicts it"),
        ("tasks.rte.seeds=[1,1]", "tasks.rte.seeds: [1, 1] has one twice"),
        ("tasks.rte.seeds=[]", "tasks.rte.seeds: is empty"),
        ("tasks.rte.trainer_kwargs.lr=null", "tasks.rte.trainer_kwargs.lr: must be set; inherit a published recipe"),
        ("tasks.rte.trainer_kwargs.lr=0", "tasks.rte.trainer_kwargs.lr: 0.0 is not above 0"),
        ("tasks.rte.trainer_kwargs.precision=bf16", "tasks.rte.trainer_kwargs.precision: 'bf16' is none of"),
        ("tasks.mnli.starting_point=mnli", "MNLI cannot start from itself"),
        ("sweep.lrs=[1e-5]", "sweep.lrs: cannot be swept; did you mean 'lr'"),
        ("sweep.lr=[1e-5,-1.0]", "sweep.lr: -1.0 is not above 0"),
        ("sweep.max_duration=[3]", "sweep.max_duration: 3 is not of the type"),
        ("from_scratch=true", "from_scratch: true, but a starting point is given too (runs/hydra)"),
        ("starting_checkpoint_load_path=null", "starting_checkpoint_load_path: must be set"),
        ("early_stopping.patience=0", "early_stopping.patience: 0 must be at least 1"),
        ("select=first", "select: 'first' is none of best, last"),
        ("lr=1", "each task has its own"),
        ("tasks=null", "tasks: none given"),
        ("model.mixer=hydar", "unknown mixer 'hydar'"),
    ],
)
def test_mistakes_name_the_key(override, message):
    with pytest.raises(UserError) as error:
        load([override])
    assert str(error.value).startswith("command line: ") and message in str(error.value)


def test_a_checkpoint_far_away_needs_a_place_to_be_downloaded_to():
    with pytest.raises(UserError, match=r"local_pretrain_checkpoint_folder: must be set; s3://x/y\.pt"):
        load(["starting_checkpoint_load_path=s3://x/y.pt"])


def test_mnli_is_needed_where_it_is_asked_for():
    with pytest.raises(UserError, match="from_mnli: needs mnli"):
        load(["from_mnli=true", "tasks.mnli=false"])
    with pytest.raises(UserError, match=r"tasks\.cola\.starting_point: needs mnli"):
        load(["tasks.cola.starting_point=mnli", "tasks.mnli=false"])
    assert not load(["tasks.mnli=false"]).starts_from_mnli("rte")
