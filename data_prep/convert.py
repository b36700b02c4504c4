"""Convert documents into MDS shards for pretraining: `python -m data_prep.convert --help`."""

from __future__ import annotations

import errno
import shutil
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from anymixer.data.tokenization import load_tokenizer, tokenizer_fingerprint
from anymixer.entry_point import run
from anymixer.errors import UserError
from data_prep.catalogue import expected_documents, is_remote
from data_prep.command_line import parse_options
from data_prep.duplicates import find_duplicates, hashes_file
from data_prep.manifest import build_manifest, check_joins, is_complete, join_manifests, save_tokenizer, write_results
from data_prep.options import ConvertOptions, conversion_settings
from data_prep.place import place_of
from data_prep.pool import prepare_processes, run_units
from data_prep.progress import ProgressDisplay
from data_prep.sources import input_files, limited
from data_prep.tokenizing import Vocabulary, vocabulary_of
from data_prep.train_tokenizer import train_wordpiece
from data_prep.unit_work import Job, convert_unit, hash_unit
from data_prep.units import Unit, plan_units, split_of
from data_prep.workspace import Workspace
from data_prep.writer import RowFormat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# A tokenizer's vocabulary is settled long before a large corpus ends.
_TOKENIZER_TRAINING_BYTES = 500_000_000
_FULL = (errno.ENOSPC, errno.EDQUOT)


def convert(options: ConvertOptions) -> dict[str, Any] | None:
    """Convert a corpus, or what is left of it, and return the manifest as it is in `out_root/manifest.json`.

    Returns:
        None while units of other shards (`options.shard`) are unfinished.

    Raises:
        UserError: impossible options, an input that cannot be read, an output folder in use or with other
            contents, or a full disk. What is finished stays finished, and the next call continues.
    """
    options.validate()
    input_files(options.input)
    try:
        with Workspace(options) as space:
            return _convert(options, space)
    except OSError as error:
        if error.errno not in _FULL:
            raise
        what = f"the disk of {place_of(options).root} is full"
        raise UserError(f"{what}; make room and start the same command again: it continues") from error


def _convert(options: ConvertOptions, space: Workspace) -> dict[str, Any] | None:
    place = space.place
    units = plan_units(options)
    prepare_processes(len(units), options.workers)
    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else None
    fingerprint = tokenizer_fingerprint(tokenizer) if tokenizer is not None else None
    settings = conversion_settings(options, tokenizer=fingerprint)
    manifest = space.manifest()
    if manifest is not None and is_complete(manifest, settings, units, place):
        space.complete()
        print(f"{options.out_root} is complete already", file=sys.stderr)
        return manifest
    space.begin(settings, units)
    rows = RowFormat(options.mode, options.row_tokens, options.compression)
    if options.train_tokenizer is not None:
        tokenizer = _trained_tokenizer(options, options.train_tokenizer, units, space)
    if manifest is not None:
        known = {"fingerprint": tokenizer_fingerprint(tokenizer)} if tokenizer is not None else None
        check_joins(manifest, {"mode": rows.mode, "max_seq_len": rows.row_tokens, "tokenizer": known}, place)
    job = Job(
        place=place,
        rows=rows,
        vocabulary=_vocabulary(options, tokenizer),
        val_fraction=options.held_out,
        min_chars=options.min_chars,
        max_chars=options.max_chars,
        dedup=options.dedup,
    )
    if not (options.dedup and _duplicates_wait(options, space, job, units)):
        _run(options, space, job, units)
    space.fetch()
    if len(place.finished()) < len(units):
        return None
    made, shards = build_manifest(
        place,
        units,
        settings=settings,
        rows=rows,
        tokenizer=tokenizer,
        tokenizer_name=options.tokenizer or "tokenizer",
    )
    _check_rows(made, options)
    files = save_tokenizer(place, tokenizer, joins=manifest is not None) if tokenizer is not None else []
    manifest = join_manifests(manifest, made, place)
    space.send([*files, *write_results(place, manifest, shards)])
    space.complete()
    return manifest


def _run(options: ConvertOptions, space: Workspace, job: Job, units: list[Unit]) -> None:
    """Convert the units of this shard that are not finished."""
    place = space.place
    finished = place.finished()
    own = _own(options, units)
    left = [unit for unit in own if unit.name not in finished]
    done = sum(unit.bytes for unit in own if unit.name in finished)
    total = sum(unit.bytes for unit in own)
    if finished and left:
        print(f"{len(finished)} of {len(units)} units are finished; continuing", file=sys.stderr)
    with ProgressDisplay("converting", max(total, 1), done) as display:
        run_units(convert_unit, job, left, options.workers, display)


def _duplicates_wait(options: ConvertOptions, space: Workspace, job: Job, units: list[Unit]) -> bool:
    """Find the duplicates; return whether that has to wait for other shards to read their documents."""
    place = space.place
    if (place.work / "dropped" / "complete").exists():
        return False
    space.fetch()
    left = [unit for unit in _own(options, units) if not hashes_file(place, unit).exists()]
    with ProgressDisplay("looking for duplicates", max(sum(unit.bytes for unit in left), 1)) as display:
        run_units(hash_unit, job, left, options.workers, display)
    space.fetch()
    if not all(hashes_file(place, unit).exists() for unit in units):
        return True
    find_duplicates(place, units)
    (place.work / "dropped" / "complete").touch()
    return False


def _own(options: ConvertOptions, units: list[Unit]) -> list[Unit]:
    """Return the units of this shard."""
    number, of = options.shard
    return units[number::of]


def _trained_tokenizer(
    options: ConvertOptions, vocab_size: int, units: list[Unit], space: Workspace
) -> PreTrainedTokenizerFast:
    """Train on the train split, or take up what was trained before.

    What is held out is not learned from, unless it is all there is.
    """
    folder = space.place.work / "tokenizer"
    if not folder.exists():
        split = options.splits[0]

        def known() -> Iterator[str]:
            own = (
                text
                for unit in units
                if split in unit.splits
                for text in unit.documents()
                if split_of(text, unit.splits, options.held_out) == split
            )
            return limited(own, max_docs=None, max_bytes=_TOKENIZER_TRAINING_BYTES)

        temporary = space.place.work / "tmp" / "tokenizer"
        shutil.rmtree(temporary, ignore_errors=True)
        train_wordpiece(known, vocab_size).save_pretrained(temporary)
        temporary.rename(folder)
        space.send(path for path in folder.iterdir())
    return load_tokenizer(str(folder))


def _vocabulary(options: ConvertOptions, tokenizer: PreTrainedTokenizerFast | None) -> Vocabulary | None:
    if tokenizer is None or options.row_tokens is None:
        return None
    vocabulary = vocabulary_of(tokenizer, options.bos_text, options.eos_text)
    special = len(vocabulary.bos) + len(vocabulary.eos)
    if 2 * special > options.row_tokens:
        raise UserError(f"--bos_text, --eos_text: {special} tokens are too many for rows of {options.row_tokens}")
    return vocabulary


def _check_rows(manifest: dict[str, Any], options: ConvertOptions) -> None:
    for split, facts in manifest["splits"].items():
        if facts["rows"] == 0:
            size = f"fills no row of {options.row_tokens} tokens" if facts["documents"] else "got no document"
            raise UserError(f"the {split} split {size}; give more text, a larger --val_fraction or fewer --splits")


def main(arguments: list[str]) -> None:
    """Convert as the command line says, and print what was written."""
    options = parse_options(arguments)
    manifest = convert(options)
    if manifest is None:
        print("this shard is finished; the data is complete when the others are (start again then if they were first)")
        return
    for split in options.splits:
        _print_split(split, manifest["splits"][split])
        expected = expected_documents(options.dataset, options.data_subset, split)
        found = manifest["splits"][split]
        read = found["documents"] + found["filtered"] + found["duplicates"]
        if expected is not None and options.max_docs is None and options.max_bytes is None and read != expected:
            print(f"warning: {split} of {options.dataset} has {expected:,} documents; {read:,} were read")
    if manifest["unigram_entropy_nats"] is not None:
        print(f"unigram entropy of the train split: {manifest['unigram_entropy_nats']:.3f} nats per token")
    if manifest["tokenizer"]:
        print(f"tokenizer: {options.out_root}/tokenizer ({manifest['tokenizer']['vocab_size']:,} entries)")
    data = "data_remote" if is_remote(options.out_root) else "data_local"
    print(f"written to {options.out_root} ({data}={options.out_root})")


def _print_split(split: str, facts: dict[str, Any]) -> None:
    parts = [f"{facts['documents']:,} documents", f"{facts['text_bytes'] / 1e6:,.2f} MB", f"{facts['rows']:,} samples"]
    if facts["tokens"]:
        parts.append(f"{facts['tokens']:,} tokens")
    if facts["sequences"]:
        parts.append(f"{facts['tokens'] / facts['positions']:.2%} of the positions filled")
    for name in ("duplicates", "filtered"):
        if facts[name]:
            parts.append(f"{facts[name]:,} {name} left out")
    print(f"{split}: {', '.join(parts)}")


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
