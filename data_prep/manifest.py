"""What a conversion made, as OUT_ROOT/manifest.json and the index of each split say it.

Neither depends on how many processes worked on it, nor on how often it was cut off.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from anymixer.data.shards import INDEX_NAME, MANIFEST_NAME
from anymixer.data.tokenization import tokenizer_fingerprint
from anymixer.errors import UserError
from anymixer.files import write_text_atomic
from data_prep.place import Place, UnitRecord
from data_prep.tokenizing import token_dtype
from data_prep.units import Unit
from data_prep.workspace import changed_inputs, changed_settings, refuse_changes
from data_prep.writer import RowFormat, SplitCounts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_LIBRARIES = ("mosaicml-streaming", "numpy", "tokenizers", "transformers")
_VERSION = 2
# Must agree among the splits of a folder; what a user can change about each.
_SHARED = {
    "mode": "--concat_tokens, --pack_tokens or --sequence_tokens",
    "max_seq_len": "row length",
    "tokenizer": "--tokenizer",
    "dtype": "--tokenizer",
}


def build_manifest(
    place: Place,
    units: Sequence[Unit],
    *,
    settings: dict[str, Any],
    rows: RowFormat,
    tokenizer: PreTrainedTokenizerFast | None,
    tokenizer_name: str,
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Return the manifest of a conversion all of whose units are finished, and the shards of each split.

    `unigram_entropy_nats` is that of the train split's tokens, special ones left out; each split's
    `unigram_cross_entropy_nats` is what predicting its tokens from the train split's frequencies costs: the
    loss of a model that ignores its context.
    """
    counts = {split: SplitCounts() for split in place.splits}
    vocabulary = len(tokenizer) if tokenizer is not None and rows.row_tokens is not None else 0
    token_counts = {split: np.zeros(vocabulary, np.int64) for split in place.splits}
    shards: dict[str, list[dict[str, Any]]] = {split: [] for split in place.splits}
    inputs: list[dict[str, Any]] = []
    for unit in units:
        record = place.read_record(unit.name)
        inputs += _inputs(record)
        for split, more in record.counts.items():
            counts[split].add(more)
        for split, entries in record.shards.items():
            shards[split] += _moved(entries, unit.name)
            token_counts[split] += record.token_counts[split]
    model = token_counts.get("train") if vocabulary else None
    splits = {split: _split(counts[split], token_counts[split], model, vocabulary) for split in place.splits}
    for split, facts in splits.items():
        own = [unit for unit in units if split in unit.splits]
        facts["parts"] = sum(len(unit.source.describe()) for unit in own)
        facts["settings"] = {**settings, "splits": list(own[0].splits)}
    manifest = {
        "version": _VERSION,
        "mode": rows.mode,
        "max_seq_len": rows.row_tokens,
        "tokenizer": tokenizer
        and {
            "name": tokenizer_name,
            "fingerprint": tokenizer_fingerprint(tokenizer),
            "vocab_size": len(tokenizer),
        },
        "dtype": token_dtype(vocabulary).__name__ if vocabulary else None,
        "unigram_entropy_nats": None if model is None else splits["train"]["unigram_cross_entropy_nats"],
        "splits": splits,
        "inputs": inputs,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in _LIBRARIES}},
    }
    return manifest, shards


def is_complete(manifest: dict[str, Any], settings: dict[str, Any], units: Sequence[Unit], place: Place) -> bool:
    """Tell whether a folder holds all splits of a conversion already.

    Raises:
        UserError: some of them were made from something else, or in another way, or only some are there.
    """
    there = [split for split in place.splits if split in manifest["splits"]]
    for split in there:
        own = [unit for unit in units if split in unit.splits]
        facts = manifest["splits"][split]
        changes = changed_settings(facts.get("settings", {}), {**settings, "splits": list(own[0].splits)})
        wanted = [part for unit in own for part in unit.source.describe()]
        known = [{key: value for key, value in part.items() if key != "xxh64"} for part in manifest["inputs"]]
        if len(wanted) != facts["parts"] or any(part not in known for part in wanted):
            changes |= changed_inputs(known, wanted)
        refuse_changes(place, f"a {split} split", changes)
    if there and len(there) < len(place.splits):
        absent = " ".join(split for split in place.splits if split not in there)
        raise UserError(f"--splits: {' '.join(there)} is made already; to add to it, give --splits {absent} alone")
    return bool(there)


def join_manifests(earlier: dict[str, Any] | None, manifest: dict[str, Any], place: Place) -> dict[str, Any]:
    """Add the splits of a conversion to those already in the folder.

    Raises:
        UserError: they are of another kind.
    """
    if earlier is None:
        return manifest
    check_joins(earlier, manifest, place)
    known = {json.dumps(part, sort_keys=True) for part in earlier["inputs"]}
    more = [part for part in manifest["inputs"] if json.dumps(part, sort_keys=True) not in known]
    return {
        **manifest,
        "unigram_entropy_nats": manifest["unigram_entropy_nats"] or earlier["unigram_entropy_nats"],
        "splits": {**earlier["splits"], **manifest["splits"]},
        "inputs": [*earlier["inputs"], *more],
    }


def check_joins(earlier: dict[str, Any], manifest: dict[str, Any], place: Place) -> None:
    """Raise UserError unless splits of one kind can join those of another in a folder."""
    for name, flag in _SHARED.items():
        if name not in manifest:
            continue
        mine, theirs = manifest[name], earlier.get(name)
        if name == "tokenizer":  # the same one may be named differently
            mine, theirs = mine and mine["fingerprint"], theirs and theirs["fingerprint"]
        if mine != theirs:
            where = f"{place.url or place.root} holds splits made with another {name}"
            raise UserError(f"--out_root: {where} ({flag}); choose another folder")


def write_results(place: Place, manifest: dict[str, Any], shards: dict[str, list[dict[str, Any]]]) -> list[Path]:
    """Write each split's index and, last, the manifest; return the files.

    streaming's own `merge_index` would read every unit's index again, through a temporary folder, and replace
    the split's index by a copy that is not atomic.
    """
    files = []
    for split, entries in shards.items():
        files.append(place.root / split / INDEX_NAME)
        write_text_atomic(files[-1], json.dumps({"version": 2, "shards": entries}, sort_keys=True))
    files.append(place.root / MANIFEST_NAME)
    write_text_atomic(files[-1], json.dumps(manifest, indent=2) + "\n")
    return files


def save_tokenizer(place: Place, tokenizer: PreTrainedTokenizerFast, *, joins: bool) -> list[Path]:
    """Save a tokenizer beside the splits; return its files.

    Args:
        joins: earlier splits are there, and were made with the same one; it stays as it is.
    """
    folder = place.root / "tokenizer"
    if not joins or not folder.exists():
        shutil.rmtree(folder, ignore_errors=True)  # of a conversion that was never completed
        temporary = place.work / "tmp" / f"tokenizer-{os.getpid()}"
        tokenizer.save_pretrained(temporary)
        os.replace(temporary, folder)
    return sorted(path for path in folder.rglob("*") if path.is_file())


def unigram_cross_entropy(counts: NDArray[np.int64], model_counts: NDArray[np.int64]) -> float:
    """Return the nats per token of a text under the unigram model of another, smoothed by one count each.

    Args:
        counts: `[vocab]`, of the text predicted.
        model_counts: `[vocab]`, of the text the model knows. The same array gives the text's own entropy,
            but for the smoothing.
    """
    model = np.log((model_counts + 1) / (model_counts.sum() + len(model_counts)))
    return float(-(counts * model).sum() / max(int(counts.sum()), 1))


def _split(
    counts: SplitCounts, token_counts: NDArray[np.int64], model: NDArray[np.int64] | None, vocabulary: int
) -> dict[str, Any]:
    facts: dict[str, Any] = dict(vars(counts))
    if not vocabulary:
        facts |= {"tokens": None, "document_tokens": None, "dropped_tokens": None, "positions": None}
    if model is not None:
        facts["unigram_cross_entropy_nats"] = unigram_cross_entropy(token_counts, model)
    return facts


def _inputs(record: UnitRecord) -> list[dict[str, Any]]:
    parts = [dict(part) for part in record.unit["inputs"]]
    if record.fingerprint is not None and len(parts) == 1:
        parts[0]["xxh64"] = record.fingerprint
    return parts


def _moved(entries: list[dict[str, Any]], folder: str) -> list[dict[str, Any]]:
    """Return a unit's shards as they are named from the split's folder."""
    moved = []
    for entry in entries:
        files = {key: value for key, value in entry.items() if isinstance(value, dict) and "basename" in value}
        named = {key: {**value, "basename": f"{folder}/{value['basename']}"} for key, value in files.items()}
        moved.append({**entry, **named})
    return moved
