"""The folder a conversion fills: complete or untouched, whenever the conversion is killed."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from anymixer.data import read_manifest, tokenizer_fingerprint
from anymixer.errors import UserError
from data_prep.writer import SplitSummary, token_dtype, unigram_cross_entropy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_LIBRARIES = ("mosaicml-streaming", "numpy", "tokenizers", "transformers")
_SHARED = ("tokenizer", "concat_tokens", "dtype")  # must agree among the splits of a folder


class Output:
    """Context that collects splits in `out_root/.tmp-<process>` and moves them into place at the end.

    One conversion at a time works on a folder. What a killed one left is removed by the next.
    """

    def __init__(self, out_root: Path, splits: tuple[str, ...]) -> None:
        self.out_root = out_root.expanduser()
        self.splits = splits
        self._work = self.out_root / f".tmp-{os.getpid()}"
        self._lock = self.out_root / ".lock"

    def __enter__(self) -> Output:
        self._made_root = not self.out_root.exists()
        try:
            self.out_root.mkdir(parents=True, exist_ok=True)
            self._descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"--out_root: cannot write to {self.out_root} ({error.strerror})") from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._descriptor)
            raise UserError(f"--out_root: another conversion is writing to {self.out_root}") from error
        for leftover in self.out_root.glob(".tmp-*"):  # ours alone while we hold the lock
            shutil.rmtree(leftover)
        try:
            self._check_unused()
        except UserError:
            self._release()
            raise
        self._work.mkdir()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self._work, ignore_errors=True)
        self._release()

    def folder(self, split: str) -> Path:
        """Return where to write a split."""
        return self._work / split

    def publish(self, manifest: dict[str, Any], tokenizer: PreTrainedTokenizerFast | None) -> dict[str, Any]:
        """Move everything into place, the manifest last; return it, joined with that of earlier splits."""
        manifest = _joined(read_manifest(self.out_root), manifest, self.out_root)
        (self._work / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
        moved = list(self.splits)
        if tokenizer is not None and not (self.out_root / "tokenizer").exists():
            tokenizer.save_pretrained(self._work / "tokenizer")
            moved.insert(0, "tokenizer")
        for name in (*moved, "manifest.json"):
            os.replace(self._work / name, self.out_root / name)
        return manifest

    def _check_unused(self) -> None:
        for split in self.splits:
            folder = self.out_root / split
            if folder.exists() and any(folder.iterdir()):
                raise UserError(f"--out_root: {folder} exists already; remove it or choose another --out_root")

    def _release(self) -> None:
        self._lock.unlink(missing_ok=True)
        os.close(self._descriptor)
        if self._made_root:
            with suppress(OSError):  # not empty: it holds the result
                self.out_root.rmdir()


def describe(
    summaries: dict[str, SplitSummary],
    *,
    dataset: str,
    inputs: list[str],
    tokenizer: PreTrainedTokenizerFast | None,
    tokenizer_name: str,
    concat_tokens: int | None,
) -> dict[str, Any]:
    """Return the manifest of a conversion.

    `unigram_entropy_nats` is that of the train split's tokens, special ones left out; each split's
    `unigram_cross_entropy_nats` is what predicting its tokens from the train split's frequencies costs: the
    loss of a model that ignores its context.
    """
    tokenized = tokenizer is not None and concat_tokens is not None
    train_counts = summaries["train"].token_counts if tokenized and "train" in summaries else None
    splits = {}
    for split, summary in summaries.items():
        splits[split] = {
            "dataset": dataset,
            "inputs": inputs,
            "documents": summary.documents,
            "text_bytes": summary.text_bytes,
            "samples": summary.samples,
            "tokens": summary.tokens if tokenized else None,
        }
        if train_counts is not None:
            splits[split]["unigram_cross_entropy_nats"] = unigram_cross_entropy(summary.token_counts, train_counts)
    return {
        "version": 1,
        "tokenizer": tokenizer
        and {
            "name": tokenizer_name,
            "fingerprint": tokenizer_fingerprint(tokenizer),
            "vocab_size": len(tokenizer),
        },
        "concat_tokens": concat_tokens,
        "dtype": token_dtype(len(tokenizer)).__name__ if tokenizer is not None and tokenized else None,
        "unigram_entropy_nats": splits["train"]["unigram_cross_entropy_nats"] if train_counts is not None else None,
        "splits": splits,
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}},
    }


def _joined(earlier: dict[str, Any] | None, manifest: dict[str, Any], out_root: Path) -> dict[str, Any]:
    """Add the splits of a conversion to those already in the folder."""
    if earlier is None:
        return manifest
    for name in _SHARED:
        mine, theirs = manifest[name], earlier[name]
        if name == "tokenizer":  # the same one may be named differently
            mine, theirs = mine and mine["fingerprint"], theirs and theirs["fingerprint"]
        if mine != theirs:
            raise UserError(f"--out_root: {out_root} holds splits made with another {name}; choose another folder")
    entropy = manifest["unigram_entropy_nats"] or earlier["unigram_entropy_nats"]
    return {
        **manifest,
        "unigram_entropy_nats": entropy,
        "splits": {**earlier["splits"], **manifest["splits"]},
    }
