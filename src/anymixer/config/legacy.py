"""Keys of MosaicBERT, Hydra and Composer recipes that mean nothing here, and what to write instead.

Only keys with no owner are listed, and those of the loaders with the reasons their owner gives. The model
refuses foreign `model.name` and `model.model_config` keys itself, and the tables of `anymixer.training`
foreign algorithms, callbacks and loggers.
"""

from collections.abc import Mapping

from anymixer.data import DatasetConfig, StreamConfig

_COMPUTED = "it is computed: global_train_batch_size / number of ranks"
_MICROBATCH = "set device_train_microbatch_size (a number, or auto)"

# MosaicBERT itself writes the first three into the configuration that it logs.
_TOP_LEVEL = {
    "n_gpus": "the launcher decides: composer -n 8 main.py FILE.yaml",
    "device_train_batch_size": _COMPUTED,
    "device_train_grad_accum": _MICROBATCH,
    "grad_accum": _MICROBATCH,
    "fsdp_config": "set parallelism_config: {fsdp: {}}",
    "deepspeed_config": "Composer no longer has DeepSpeed; set parallelism_config: {fsdp: {}}",
}

REFUSED: Mapping[str, str] = {
    **_TOP_LEVEL,
    **{f"*_loader.dataset.{key}": reason for key, reason in DatasetConfig.RENAMED.items()},
    **{f"*_loader.dataset.streams.*.{key}": reason for key, reason in StreamConfig.RENAMED.items()},
}
"""Key path, in which `*` stands for one key, to what to write instead."""
