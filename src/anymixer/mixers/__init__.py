"""Sequence mixers, one file each. Every module of this folder is imported, so a new file needs no list."""

import importlib
import pkgutil

from anymixer.mixers.base import SequenceMixer, build_mixer, mixers, parse_mixer, register_mixer

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

__all__ = ["SequenceMixer", "build_mixer", "mixers", "parse_mixer", "register_mixer"]
