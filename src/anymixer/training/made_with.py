"""What a run was made with, as every checkpoint keeps it: packages' versions and the tokenizer's fingerprint."""

import platform
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import anymixer
from anymixer.data import tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_PACKAGES = ("torch", "mosaicml", "mosaicml-streaming", "transformers", "tokenizers", "numpy")


def made_with(tokenizer: "PreTrainedTokenizerFast") -> dict[str, Any]:
    """{"packages": {name: version}, "tokenizer_sha256": ...}, to be kept among a run's hyperparameters."""
    own = {"anymixer": anymixer.__version__, "python": platform.python_version()}
    packages = own | {name: version(name) for name in _PACKAGES}
    return {"packages": packages, "tokenizer_sha256": tokenizer_fingerprint(tokenizer)}
