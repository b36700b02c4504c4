"""Text for pretraining: streaming MDS shards, tokenizers, masking and data loaders."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from anymixer.data.checks import check_batch_size, check_data
from anymixer.data.config import DatasetConfig, LoaderConfig, StreamConfig
from anymixer.data.loader import build_eval_loaders, build_loader
from anymixer.data.masking import maskings
from anymixer.data.shards import read_manifest
from anymixer.data.tokenization import load_tokenizer, tokenizer_fingerprint, wordpiece_tokenizer

if TYPE_CHECKING:
    from anymixer.data.dataset import TextDataset

__all__ = [
    "DatasetConfig",
    "LoaderConfig",
    "StreamConfig",
    "TextDataset",
    "build_eval_loaders",
    "build_loader",
    "check_batch_size",
    "check_data",
    "load_tokenizer",
    "maskings",
    "read_manifest",
    "tokenizer_fingerprint",
    "wordpiece_tokenizer",
]


def __getattr__(name: str) -> Any:
    # Its base class comes from streaming, which takes seconds to import; settings and checks do without it.
    if name == "TextDataset":
        from anymixer.data.dataset import TextDataset

        return TextDataset
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
