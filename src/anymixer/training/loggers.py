"""The loggers a YAML file may name: Composer's own. Console and progress bar have keys of their own."""

import time
from pathlib import PurePath
from typing import TYPE_CHECKING

from anymixer.training.named_table import NamedTable

if TYPE_CHECKING:
    from composer.loggers import FileLogger


def file_logger(
    filename: str = "{run_name}/logs-rank{rank}.txt",
    *,
    capture_stdout: bool = True,
    capture_stderr: bool = True,
    buffer_size: int = 1,
    log_traces: bool = False,
    flush_interval: int = 100,
) -> "FileLogger":
    """Build Composer's FileLogger so that a resumed run keeps the log of the run before it.

    Composer 0.32.1 opens the file for overwriting whatever `overwrite` says, so each start writes a
    file of its own: the time of the start (UTC) goes before the suffix.
    """
    from composer.loggers import FileLogger

    path = PurePath(filename)
    started = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    return FileLogger(
        str(path.with_name(f"{path.stem}-{started}{path.suffix}")),
        capture_stdout=capture_stdout,
        capture_stderr=capture_stderr,
        buffer_size=buffer_size,
        log_traces=log_traces,
        flush_interval=flush_interval,
    )


LOGGERS = NamedTable(
    section="loggers",
    factories={
        "cometml": "composer.loggers:CometMLLogger",
        "file_logger": "anymixer.training.loggers:file_logger",
        "in_memory": "composer.loggers:InMemoryLogger",
        "mlflow": "composer.loggers:MLFlowLogger",
        "neptune": "composer.loggers:NeptuneLogger",
        "slack": "composer.loggers:SlackLogger",
        "tensorboard": "composer.loggers:TensorboardLogger",
        "wandb": "composer.loggers:WandBLogger",
    },
    refused={
        "console": "set log_to_console=true and console_log_interval instead",
        "progress_bar": "set progress_bar=true instead",
        "mosaicml": "Composer adds it by itself on the MosaicML platform",
        "object_store": "give save_folder as a URI (s3://bucket/folder) instead",
    },
    packages={
        "cometml": "comet_ml",
        "mlflow": "mlflow",
        "neptune": "neptune",
        "slack": "slack_sdk",
        "tensorboard": "tensorboard",
        "wandb": "wandb",
    },
    extra="loggers",
)
