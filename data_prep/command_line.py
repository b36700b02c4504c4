"""The command line of the conversion."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from anymixer.entry_point import ArgumentParser
from anymixer.errors import UserError
from data_prep.catalogue import CATALOGUE, is_remote
from data_prep.options import SPLITS, ConvertOptions
from data_prep.sources import SEPARATORS, SUPPORTED

_EXAMPLES = """
examples:
  # the built-in corpus, a vocabulary of its own, documents joined into full rows
  python -m data_prep.convert --dataset demo --out_root data/demo --train_tokenizer 4096 --concat_tokens 128

  # files of your own, whole documents packed into rows of 512 tokens
  python -m data_prep.convert --dataset text --input wiki.txt.xz more.jsonl.gz --out_root data/wiki \\
      --tokenizer bert-base-uncased --pack_tokens 512

  # C4 as MosaicBERT used it: texts, which the loader tokenizes, cuts and pads
  python -m data_prep.convert --dataset c4 --data_subset en --splits train val train_small val_small \\
      --out_root s3://bucket/c4 --compression zstd

  # the same corpus packed, by 16 jobs that share a folder (or a remote one); start job I again if it is killed
  python -m data_prep.convert --dataset c4 --out_root /shared/c4 --tokenizer bert-base-uncased \\
      --pack_tokens 128 --shard I/16

Each input file, part of a large text file, or file of a dataset on the Hub is a unit of work. A finished unit is
never made again: kill the command at any time and start it again, and it continues. OUT_ROOT then holds the
splits' folders, tokenizer/ and manifest.json; a split has no index, and so cannot be read, before it is complete.
"""


def parse_options(arguments: list[str] | None = None) -> ConvertOptions:
    """Read the command line."""
    given = vars(_parser().parse_args(arguments))
    given["splits"] = tuple(split for split in SPLITS if split in given["splits"])
    given["input"] = tuple(given["input"])
    given["out_root"] = given["out_root"] if is_remote(given["out_root"]) else Path(given["out_root"])
    given["shard"] = _shard(given["shard"])
    return ConvertOptions(**given)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m data_prep.convert",
        description="Convert documents into MDS shards for pretraining.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _add_sources(parser.add_argument_group("what to read"))
    _add_samples(parser.add_argument_group("what to write"))
    _add_work(parser.add_argument_group("how to work"))
    return parser


def _add_sources(group: Any) -> None:
    known = ", ".join(CATALOGUE)
    help_ = f"demo (built in), text (your files), {known}, or a name on the Hugging Face Hub"
    group.add_argument("--dataset", required=True, metavar="NAME", help=help_)
    group.add_argument("--data_subset", metavar="NAME", help="configuration of a dataset on the Hub (c4: en)")
    kinds = f"files or folders to convert: {SUPPORTED}; with c4, its own *.json.gz files"
    group.add_argument("--input", nargs="+", type=Path, default=(), metavar="FILE", help=kinds)
    splits = "train and val by default; one alone takes every document of a corpus without splits of its own"
    group.add_argument("--splits", nargs="+", choices=SPLITS, default=("train", "val"), help=splits)
    held_out = "of the documents, held out of a corpus without a val split (default: 0.02; demo: 0.05)"
    group.add_argument("--val_fraction", type=float, metavar="SHARE", help=held_out)
    separator = "ends a document of a text file (default: blank)"
    group.add_argument("--doc_separator", choices=SEPARATORS, default="blank", help=separator)
    column = "field of JSON lines, Parquet files and datasets that holds the text (default: text)"
    group.add_argument("--text_column", default="text", metavar="NAME", help=column)
    group.add_argument("--min_chars", type=int, metavar="N", help="leave out shorter documents")
    group.add_argument("--max_chars", type=int, metavar="N", help="leave out longer documents")
    dedup = "leave out all but the first of equal documents; reads everything twice"
    group.add_argument("--dedup", action="store_true", help=dedup)
    group.add_argument("--max_docs", type=int, metavar="N", help="stop after N documents; not in parallel")
    group.add_argument("--max_bytes", type=int, metavar="N", help="stop after N bytes of text; not in parallel")


def _add_samples(group: Any) -> None:
    out_root = "folder to make, or a URL that begins with s3://, gs:// or hf://datasets/"
    group.add_argument("--out_root", required=True, metavar="DIR", help=out_root)
    tokenizer = "Hugging Face name, folder, vocab.txt or tokenizer.json"
    group.add_argument("--tokenizer", metavar="NAME_OR_PATH", help=tokenizer)
    train = "train a lower-case WordPiece on the train split"
    group.add_argument("--train_tokenizer", type=int, metavar="VOCAB_SIZE", help=train)
    concat = "write rows of N token ids: documents joined and wrapped"
    group.add_argument("--concat_tokens", type=int, metavar="N", help=concat)
    pack = "write rows of up to N token ids: whole documents, the long ones cut, packed by best fit"
    group.add_argument("--pack_tokens", type=int, metavar="N", help=pack)
    sequence = "the same, but with one document, or piece of one, in a row"
    group.add_argument("--sequence_tokens", type=int, metavar="N", help=f"{sequence}. Without any of these: texts")
    bos = "begins every row, or packed document (default: the tokenizer's [CLS] or BOS)"
    group.add_argument("--bos_text", metavar="TEXT", help=bos)
    eos = "ends every row and document (default: [SEP] or EOS)"
    group.add_argument("--eos_text", metavar="TEXT", help=eos)
    group.add_argument("--compression", metavar="NAME", help="compress the shards, e.g. zstd, or zstd:7")


def _add_work(group: Any) -> None:
    cores = "cores to use (default: all); few files may take two processes more"
    group.add_argument("--num_workers", type=int, metavar="N", help=cores)
    group.add_argument("--shard", default="0/1", metavar="I/N", help="do only the units whose number is I modulo N")
    work_dir = "where shards are made before they go to a remote OUT_ROOT (default: below ~/.cache/anymixer)"
    group.add_argument("--work_dir", type=Path, metavar="DIR", help=work_dir)


def _shard(text: str) -> tuple[int, int]:
    number, _, of = text.partition("/")
    if not (number.isdigit() and of.isdigit()):
        raise UserError(f"--shard: {text}: give I/N with I from 0 to N - 1")
    return int(number), int(of)
