"""Training through MosaicML Composer: what to run (`TrainerConfig`), the tables of names, `build_trainer`.

Importing this package brings the configuration alone; the modules beneath it that need Composer are
imported by whoever trains: `anymixer.training.launch`, `.trainer`.
"""

from anymixer.training.tables import check_tables
from anymixer.training.trainer_config import OptimizerConfig, SchedulerConfig, TrainerConfig

__all__ = ["OptimizerConfig", "SchedulerConfig", "TrainerConfig", "check_tables"]
