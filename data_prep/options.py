"""The options of a conversion, and which of them make it another one."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from anymixer.errors import UserError
from data_prep.catalogue import CATALOGUE, is_remote
from data_prep.sources import SEPARATORS

SPLITS = ("train", "val", "train_small", "val_small")
_FEWEST_TOKENS = 8
_VAL_FRACTION = 0.02
_DEMO_VAL_FRACTION = 0.05  # the demo corpus is small
_ROW_FLAGS = ("concat_tokens", "pack_tokens", "sequence_tokens")
_MODES = ("concatenated", "packed", "sequences")


@dataclass(frozen=True)
class ConvertOptions:
    """What to convert, and into what; the names are the command's flags."""

    dataset: str
    out_root: Path | str  # a folder, or the URL of one
    data_subset: str | None = None
    input: tuple[Path, ...] = ()
    splits: tuple[str, ...] = ("train", "val")
    val_fraction: float | None = None  # by the dataset
    tokenizer: str | None = None
    train_tokenizer: int | None = None
    concat_tokens: int | None = None
    pack_tokens: int | None = None
    sequence_tokens: int | None = None
    bos_text: str | None = None
    eos_text: str | None = None
    compression: str | None = None
    doc_separator: str = "blank"
    text_column: str = "text"
    max_docs: int | None = None
    max_bytes: int | None = None
    min_chars: int | None = None
    max_chars: int | None = None
    dedup: bool = False
    num_workers: int | None = None  # by the machine
    shard: tuple[int, int] = (0, 1)
    work_dir: Path | None = None

    @property
    def held_out(self) -> float:
        """The share of the documents in the val split, where the corpus has none of its own."""
        if self.val_fraction is not None:
            return self.val_fraction
        return _DEMO_VAL_FRACTION if self.dataset == "demo" else _VAL_FRACTION

    @property
    def mode(self) -> str:
        """What a sample is: "text", or "concatenated", "packed" or "sequences" of token ids."""
        given = (mode for flag, mode in zip(_ROW_FLAGS, _MODES) if getattr(self, flag) is not None)
        return next(given, "text")

    @property
    def row_tokens(self) -> int | None:
        """Tokens of a row, None for texts."""
        given = (getattr(self, flag) for flag in _ROW_FLAGS)
        return next((length for length in given if length is not None), None)

    @property
    def workers(self) -> int:
        """How many cores to use."""
        if self.num_workers is not None:
            return self.num_workers
        # macOS does not say which cores a process may use.
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

    def validate(self) -> None:
        """Raise UserError for options that cannot be met; reads no file."""
        self._check_source()
        self._check_tokens()
        self._check_numbers()
        if is_remote(self.out_root) and str(self.out_root).partition("://")[0] not in ("s3", "gs", "hf"):
            raise UserError(f"--out_root: {self.out_root}: give a folder, or a URL that begins with s3, gs or hf")
        if self.work_dir is not None and not is_remote(self.out_root):
            raise UserError("--work_dir: goes with a remote --out_root; a folder is written to directly")
        if self.compression is not None:
            from streaming.base.compression import is_compression

            if not is_compression(self.compression):
                raise UserError(f"--compression: unknown '{self.compression}'; try zstd, or zstd:7 for its level 7")

    def _check_source(self) -> None:
        if self.dataset == "text" and not self.input:
            raise UserError("--input: name the files to convert, or use --dataset demo")
        if self.dataset == "demo" and self.input:
            raise UserError("--input: goes with --dataset text; the demo corpus needs no files")
        near = get_close_matches(self.dataset, ("text", *CATALOGUE), n=1, cutoff=0.8)
        if self.input and near and near != [self.dataset]:
            raise UserError(f"--dataset: unknown '{self.dataset}'; did you mean '{near[0]}'?")
        if self.data_subset is not None and (self.dataset in ("demo", "text") or self.input):
            raise UserError("--data_subset: names a part of a dataset on the Hugging Face Hub; there is none here")
        small = [split for split in self.splits if split.endswith("_small")]
        if small and not (self.dataset in CATALOGUE and CATALOGUE[self.dataset].splits):
            raise UserError(f"--splits: {' '.join(small)} exist for c4 and the_pile; elsewhere use --max_docs")
        if self.doc_separator not in SEPARATORS:
            raise UserError(f"--doc_separator: unknown '{self.doc_separator}'; choose from {', '.join(SEPARATORS)}")

    def _check_tokens(self) -> None:
        if self.tokenizer and self.train_tokenizer:
            raise UserError("--tokenizer and --train_tokenizer: give one of them")
        given = [flag for flag in _ROW_FLAGS if getattr(self, flag) is not None]
        if len(given) > 1:
            raise UserError(f"--{' and --'.join(given)}: give one of them")
        for flag in given:
            if not (self.tokenizer or self.train_tokenizer):
                raise UserError(f"--{flag}: needs --tokenizer NAME_OR_PATH or --train_tokenizer VOCAB_SIZE")
            if getattr(self, flag) < _FEWEST_TOKENS:
                few = f"{getattr(self, flag)} tokens are too few for a row"
                raise UserError(f"--{flag}: {few}; use at least {_FEWEST_TOKENS}")

    def _check_numbers(self) -> None:
        if not 0 < self.held_out < 1:
            raise UserError(f"--val_fraction: {self.val_fraction} is not between 0 and 1")
        for flag in ("max_docs", "max_bytes", "min_chars", "max_chars", "num_workers"):
            value = getattr(self, flag)
            if value is not None and value < 1:
                raise UserError(f"--{flag}: {value} is too small; use at least 1")
        if self.min_chars and self.max_chars and self.min_chars > self.max_chars:
            raise UserError(f"--min_chars: {self.min_chars} is more than --max_chars {self.max_chars}")
        number, of = self.shard
        if not 0 <= number < of:
            raise UserError(f"--shard: {number}/{of}: give I/N with I from 0 to N - 1")


# What may change from one start of a conversion to the next: where and how fast, not what.
_FREE = frozenset({"out_root", "num_workers", "shard", "work_dir", "input", "tokenizer", "splits"})


def conversion_settings(options: ConvertOptions, *, tokenizer: str | None) -> dict[str, Any]:
    """Return what two conversions must agree in for one to continue the other; JSON values, by flag.

    `input` and `splits` are not among them: they are compared unit by unit and split by split.

    Args:
        tokenizer: fingerprint of the one given by name, which may be named differently.
    """
    plain = {field.name: getattr(options, field.name) for field in fields(options) if field.name not in _FREE}
    return {**plain, "val_fraction": options.held_out, "tokenizer": tokenizer}
