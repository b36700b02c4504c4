"""Whose checkpoints are read, and how their parameters are told apart."""

import importlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Kind:
    """A project whose checkpoints are read.

    mark: what one of its parameters is called. module: of this package, with `convert_weights` and `convert_config`
    (their names and configuration -> ours), `infer_config` where the weights alone tell the configuration, and
    `original_logits` with `ORIGINAL`, the name of the code that gives them, where that is in transformers.
    """

    title: str
    mark: str
    module: str

    def load(self) -> Any:
        """The module."""
        return importlib.import_module(f"anymixer.checkpoints.{self.module}")


HUGGING_FACE_BERT = Kind("a Hugging Face BERT", r".*attention\.self\.query\..*", "hf_bert")
OURS = Kind("a model of ours", r".*backbone\.layers\.\d+\..*", "own")
KINDS = (
    Kind("a published Hydra", r".*encoder\.layer\.\d+\.layer\.mixer\..*", "published_hydra"),
    Kind("a MosaicBERT", r".*attention\.self\.Wqkv\..*", "mosaic_bert"),
    HUGGING_FACE_BERT,
    Kind("a Hugging Face Doge", r"model\.layers\.\d+\.self_attn\.dt_proj\..*", "hf_doge"),
    OURS,
)


def kind_of(names: Iterable[str]) -> Kind | None:
    """Whose parameters these are, None for a project that is not known."""
    names = list(names)
    return next((kind for kind in KINDS if any(re.fullmatch(kind.mark, name) for name in names)), None)
