"""Every key that MosaicBERT's and Hydra's pretraining scripts read is honoured, or refused with a reason.

The tables below list them all, so a key that gets lost, or is accepted and ignored, fails here.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from anymixer.config import PretrainConfig, load_config
from anymixer.config.check import known_keys
from anymixer.config.legacy import REFUSED
from anymixer.errors import UserError
from anymixer.training.algorithms import ALGORITHMS
from anymixer.training.callbacks import CALLBACKS
from anymixer.training.loggers import LOGGERS
from anymixer.training.schedulers import SCHEDULERS

LOADER = {
    "name": "text",
    "drop_last": True,
    "num_workers": 8,
    "pin_memory": True,
    "prefetch_factor": 2,
    "persistent_workers": True,
    "timeout": 0.0,
    "dataset.local": "./my-copy-c4",
    "dataset.remote": "s3://bucket/c4",
    "dataset.split": "train",
    "dataset.max_seq_len": 128,
    "dataset.shuffle": True,
    "dataset.mlm_probability": 0.15,
    "dataset.tokenizer_name": "bert-base-uncased",
    "dataset.shuffle_algo": "py1s",
    "dataset.shuffle_seed": 9176,
    "dataset.num_canonical_nodes": 128,
    "dataset.predownload": 100000,
    "dataset.partition_algo": "orig",
    "dataset.download_retry": 2,
    "dataset.download_timeout": 60.0,
    "dataset.validate_hash": "sha1",
    "dataset.keep_zip": False,
    "dataset.epoch_size": 1000,
    "dataset.cache_limit": "100gb",
    "dataset.streams.wiki.remote": "s3://bucket/wiki",
    "dataset.streams.wiki.local": "./wiki",
    "dataset.streams.wiki.split": "train",
    "dataset.streams.wiki.proportion": 1.0,
    "dataset.eos_token_id": 102,
}

HONOURED: dict[str, Any] = {
    "data_local": "./my-copy-c4",
    "data_remote": "s3://bucket/c4",
    "max_seq_len": 128,
    "tokenizer_name": "bert-base-uncased",
    "mlm_probability": 0.3,
    "model.name": "hf_bert",
    "model.pretrained_model_name": "bert-base-uncased",
    "model.tokenizer_name": "bert-base-uncased",
    "model.gradient_checkpointing": True,
    "model.use_pretrained": True,
    "model.model_config": {"num_hidden_layers": 2, "hidden_size": 768},
    **{f"{loader}.{key}": value for loader in ("train_loader", "eval_loader") for key, value in LOADER.items()},
    "scheduler.name": "linear_decay_with_warmup",
    "scheduler.t_warmup": "0.06dur",
    "scheduler.alpha_f": 0.02,
    "optimizer.name": "decoupled_adamw",
    "optimizer.lr": 5e-4,
    "optimizer.betas": [0.9, 0.98],
    "optimizer.eps": 1e-6,
    "optimizer.weight_decay": 1e-5,
    "algorithms": {"gradient_clipping": {"clipping_type": "norm", "clipping_threshold": 1.0}},
    "max_duration": "286720000sp",
    "eval_interval": "2000ba",
    "global_train_batch_size": 4096,
    "seed": 17,
    "device_train_microbatch_size": 128,
    "device_eval_batch_size": 128,
    "global_eval_batch_size": 1024,
    "precision": "amp_bf16",
    "progress_bar": False,
    "log_to_console": True,
    "console_log_interval": "1ba",
    "python_log_level": "debug",
    "train_subset_num_batches": 10,
    "eval_subset_num_batches": 10,
    "device": "cpu",
    "callbacks": {"speed_monitor": {"window_size": 500}, "lr_monitor": {}},
    "loggers": {"wandb": {"project": "p", "entity": "e"}},
    "save_folder": "./checkpoints/{run_name}",
    "save_interval": "1000ba",
    "save_num_checkpoints_to_keep": 1,
    "save_overwrite": True,
    "load_path": "./old.pt",
    "load_weights_only": True,
    "autoresume": True,
    "run_name": "mosaic-bert",
}

# Keys and values that exclude some of those above.
HONOURED_APART: list[tuple[str, Any]] = [
    ("model.pretrained_checkpoint", "./old.pt"),
    ("train_loader.dataset.bos_token_id", 101),
    ("eval_loader.dataset.bos_token_id", 101),
    ("device_train_microbatch_size", "auto"),
    ("train_loader.dataset.streams.wiki.repeat", 2.0),
    ("train_loader.dataset.streams.wiki.choose", 10),
]

REFUSED_BY_NAME = {
    "train_loader.dataset.keep_raw=true": "cache_limit",
    "eval_loader.dataset.keep_raw=true": "cache_limit",
    "train_loader.dataset.samples_per_epoch=100": "epoch_size",
    "eval_loader.dataset.samples_per_epoch=100": "epoch_size",
    "train_loader.dataset.streams.wiki.samples=10": "choose",
    "model.name=mosaic_bert": "attention",
    "model.name=bert": "hydra",
    "model.model_config.max_position_embedding=128": "max_position_embeddings",
    "model.model_config.use_position_embeddings=false": "position_embeddings",
    "model.model_config.matrix_mixer_type=hydra": "model.mixer.name",
    "model.model_config.alibi_starting_size=512": "alibi",
    "n_gpus=8": "composer -n 8",
    "device_train_batch_size=512": "global_train_batch_size",
    "device_train_grad_accum=4": "device_train_microbatch_size",
    "grad_accum=4": "device_train_microbatch_size",
    "fsdp_config={}": "parallelism_config",
}

MODEL = "tokenizer_name: bert-base-uncased\nmodel: {mixer: hydra, model_config: {hidden_size: 32}}\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text)
    return path


def attribute(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config[part] if isinstance(config, dict) else getattr(config, part)
    return config


def test_every_honoured_key_arrives(tmp_path):
    config = load_config(
        write(tmp_path, "seed: 1\n"), [f"{key}={json.dumps(value)}" for key, value in HONOURED.items()]
    )
    assert {key: attribute(config, key) for key in HONOURED} == HONOURED


@pytest.mark.parametrize(("key", "value"), HONOURED_APART)
def test_honoured_keys_that_exclude_others(tmp_path, key, value):
    config = load_config(write(tmp_path, MODEL), [f"{key}={json.dumps(value)}"])
    assert attribute(config, key) == value


@pytest.mark.parametrize(("override", "instead"), REFUSED_BY_NAME.items())
def test_refused_keys_say_what_to_write_instead(tmp_path, override, instead):
    with pytest.raises(UserError) as error:
        load_config(write(tmp_path, MODEL), [override])
    message = str(error.value)
    assert message.startswith(f"command line: {override.partition('=')[0]}: ")
    assert instead in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("table", "honoured", "refused"),
    [
        (ALGORITHMS, "gradient_clipping low_precision_layernorm", "alibi fused_layernorm gated_linear_units"),
        (
            CALLBACKS,
            "speed_monitor lr_monitor memory_monitor runtime_estimator optimizer_monitor",
            "health_checker",
        ),
        (LOGGERS, "wandb tensorboard file_logger mlflow", ""),
        (SCHEDULERS, "constant_with_warmup cosine_with_warmup linear_decay_with_warmup", ""),
    ],
)
def test_every_known_name_is_in_its_table(table, honoured, refused):
    assert set(honoured.split()) <= set(table.factories)
    assert set(refused.split()) <= set(table.refused)


def test_no_key_is_both_known_and_refused():
    known = set(known_keys(PretrainConfig))
    for pattern in REFUSED:
        keys = {pattern.replace("*", loader, 1) for loader in ("train", "eval")}
        assert not known & keys
