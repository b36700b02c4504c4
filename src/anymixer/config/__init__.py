"""Typed configuration: YAML files and `key=value` overrides to one checked dataclass, and back."""

from anymixer.config.base import ConfigSchema
from anymixer.config.glue_schema import GlueConfig
from anymixer.config.load import dump_config, load_config
from anymixer.config.schema import PretrainConfig

__all__ = ["ConfigSchema", "GlueConfig", "PretrainConfig", "dump_config", "load_config"]
