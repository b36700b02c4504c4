"""The configuration of a GLUE run, as `load_config` fills it from YAML."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from anymixer.config import legacy
from anymixer.config.base import ConfigSchema
from anymixer.config.layers import lookup
from anymixer.glue.config import GlueSettings
from anymixer.glue.tasks import get_task


@dataclass(kw_only=True)
class GlueConfig(GlueSettings, ConfigSchema):
    """`GlueSettings`, its names filled in: `base_run_name` from $COMPOSER_RUN_NAME or the file's name, and the folder
    of the results from it. `tasks.<task>: false` takes an inherited task away."""

    REFUSED: ClassVar[Mapping[str, str]] = legacy.GLUE_REFUSED
    REPLACED_BY_NAME: ClassVar[frozenset[str]] = frozenset({"model.mixer", "model.model_config.channel_mixer"})
    CLEARABLE: ClassVar[frozenset[str]] = frozenset({"algorithms", "callbacks", "loggers", "tasks"})

    @classmethod
    def unset_values(cls, layers: Mapping[str, Any], stem: str) -> Mapping[str, Any]:
        """Return the run's name and folder."""
        name = lookup(layers, "base_run_name") or os.environ.get("COMPOSER_RUN_NAME") or stem
        prefix = str(lookup(layers, "save_finetune_checkpoint_prefix") or cls.save_finetune_checkpoint_prefix)
        return {"base_run_name": name, "save_finetune_checkpoint_folder": f"{prefix.rstrip('/')}/${{base_run_name}}"}

    @classmethod
    def check_cleared(cls, section: str, name: str) -> None:
        """Raise UserError for a task that does not exist."""
        if section == "tasks":
            get_task(name)
