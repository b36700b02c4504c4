"""Check everything a configuration names, without building anything or looking at a device."""

from typing import TYPE_CHECKING

from anymixer.training.named_table import NamedTable

if TYPE_CHECKING:
    from anymixer.training.trainer_config import TrainerConfig


def check_tables(config: "TrainerConfig") -> None:
    """Raise UserError for an unknown name or argument.

    Of the optimizer, the scheduler, the algorithms, the callbacks, the loggers and FSDP. Imports Composer
    (seconds), because the arguments are checked against the signatures of its classes.
    """
    from anymixer.training.algorithms import ALGORITHMS
    from anymixer.training.callbacks import CALLBACKS
    from anymixer.training.loggers import LOGGERS
    from anymixer.training.optimizers import optimizer_factory
    from anymixer.training.schedulers import scheduler_kwargs

    optimizer_factory(config.optimizer)
    scheduler_kwargs(config.scheduler)
    sections: list[tuple[NamedTable, dict]] = [
        (ALGORITHMS, config.algorithms),
        (CALLBACKS, config.callbacks),
        (LOGGERS, config.loggers),
    ]
    for table, section in sections:
        table.check(section)
    _check_parallelism(config)


def _check_parallelism(config: "TrainerConfig") -> None:
    from anymixer.training.parallelism import build_parallelism

    build_parallelism(config.parallelism_config)
