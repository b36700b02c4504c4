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

_ONE_FOR_ALL = "it is the same for every task; set it at the top level"

GLUE_REFUSED: Mapping[str, str] = {
    "task_name": "Hydra's program never read it; name the tasks under tasks",
    "seed": "set default_seed, or tasks.<task>.seeds",
    "lr": "each task has its own: set tasks.<task>.trainer_kwargs.lr, or sweep.lr for a grid",
    "optimizer.lr": "each task has its own: set tasks.<task>.trainer_kwargs.lr, or sweep.lr for a grid",
    "optimizer.weight_decay": "each task has its own: set tasks.<task>.trainer_kwargs.weight_decay",
    "load_path": "set starting_checkpoint_load_path",
    "save_folder": "set save_finetune_checkpoint_folder",
    "run_name": "set base_run_name",
    "tasks.*.trainer_kwargs.wd": "write weight_decay",
    "tasks.*.trainer_kwargs.optim_name": "set optimizer.name, for all tasks",
    "tasks.*.trainer_kwargs.pool_all": "set pooling: mean, for all tasks or under tasks.<task>",
    "tasks.*.trainer_kwargs.seed": "set tasks.<task>.seeds",
    "tasks.*.trainer_kwargs.save_folder": "set save_finetune_checkpoint_folder; every job has a folder in it",
    "tasks.*.trainer_kwargs.load_path": "set tasks.<task>.starting_point",
    **{
        f"tasks.*.trainer_kwargs.{key}": _ONE_FOR_ALL
        for key in ("scheduler", "schedulers", "optimizer", "optimizers", "algorithms", "callbacks", "loggers")
    },
    **_TOP_LEVEL,
}
"""The same for a GLUE run."""
