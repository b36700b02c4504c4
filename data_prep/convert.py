"""Convert documents into MDS shards for pretraining.

    python -m data_prep.convert --dataset demo --out_root data/demo --train_tokenizer 4096 --concat_tokens 128
    python -m data_prep.convert --dataset text --input wiki.txt.xz --out_root data/wiki \\
        --tokenizer bert-base-uncased --concat_tokens 128
    python -m data_prep.convert --dataset text --input a.jsonl.gz b.parquet --out_root data/mine

Without --concat_tokens, samples are texts and the loader tokenizes, cuts and pads them; with it, they are
full rows of token ids. The result is OUT_ROOT/train and OUT_ROOT/val, OUT_ROOT/tokenizer and
OUT_ROOT/manifest.json. Nothing is there before all of it is complete.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from anymixer.data import load_tokenizer
from anymixer.entry_point import run
from anymixer.errors import UserError
from data_prep.demo_corpus import demo_documents
from data_prep.output import Output, describe
from data_prep.sources import SEPARATORS, SUPPORTED, check_inputs, limited, read_documents
from data_prep.train_tokenizer import train_wordpiece
from data_prep.writer import SplitSummary, SplitWriter, TextWriter, TokenWriter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

DATASETS = ("demo", "text")
SPLITS = ("train", "val")
_VAL_FRACTION = {"demo": 0.05, "text": 0.02}
_BATCH_DOCUMENTS = 1024
_BATCH_CHARS = 4_000_000
# A tokenizer's vocabulary is settled long before a large corpus ends.
_TOKENIZER_TRAINING_BYTES = 500_000_000


@dataclass(frozen=True)
class ConvertOptions:
    """What to convert, and into what; the names are the command's flags."""

    dataset: str
    out_root: Path
    input: tuple[Path, ...] = ()
    splits: tuple[str, ...] = SPLITS
    val_fraction: float | None = None  # by the dataset: the demo corpus is small
    tokenizer: str | None = None
    train_tokenizer: int | None = None
    concat_tokens: int | None = None
    bos_text: str | None = None
    eos_text: str | None = None
    compression: str | None = None
    doc_separator: str = "blank"
    text_column: str = "text"
    max_docs: int | None = None
    max_bytes: int | None = None

    @property
    def held_out(self) -> float:
        """The share of the documents in the val split."""
        return _VAL_FRACTION[self.dataset] if self.val_fraction is None else self.val_fraction

    def validate(self) -> None:
        """Raise UserError for options that cannot be met; reads no file."""
        if self.dataset == "text" and not self.input:
            raise UserError("--input: name the files to convert, or use --dataset demo")
        if self.dataset == "demo" and self.input:
            raise UserError("--input: goes with --dataset text; the demo corpus needs no files")
        if self.tokenizer and self.train_tokenizer:
            raise UserError("--tokenizer and --train_tokenizer: give one of them")
        if self.concat_tokens is not None and not (self.tokenizer or self.train_tokenizer):
            raise UserError("--concat_tokens: needs --tokenizer NAME_OR_PATH or --train_tokenizer VOCAB_SIZE")
        if self.concat_tokens is not None and self.concat_tokens < 8:
            raise UserError(f"--concat_tokens: {self.concat_tokens} tokens are too few for a row; use at least 8")
        if not 0 < self.held_out < 1:
            raise UserError(f"--val_fraction: {self.val_fraction} is not between 0 and 1")
        if self.compression is not None:
            from streaming.base.compression import is_compression

            if not is_compression(self.compression):
                raise UserError(f"--compression: unknown '{self.compression}'; try zstd, or zstd:7 for its level 7")


def convert(options: ConvertOptions) -> dict[str, Any]:
    """Convert a corpus and return the manifest, as it is in `out_root/manifest.json`.

    Raises:
        UserError: impossible options, an input that cannot be read, or an output folder already in use.
    """
    options.validate()
    check_inputs(options.input)
    with Output(options.out_root, options.splits) as output:
        tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else None
        documents = _document_source(options)
        if options.train_tokenizer is not None:
            tokenizer = _trained_tokenizer(options, options.train_tokenizer, documents)
        writers = {split: _writer(options, output.folder(split), tokenizer) for split in options.splits}
        summaries = _write_all(documents(), writers, options.held_out)
        _check_rows(summaries, options)
        manifest = describe(
            summaries,
            dataset=options.dataset,
            inputs=[path.name for path in options.input],
            tokenizer=tokenizer,
            tokenizer_name=options.tokenizer or "tokenizer",
            concat_tokens=options.concat_tokens,
        )
        return output.publish(manifest, tokenizer)


def split_of(document: str, splits: tuple[str, ...], val_fraction: float) -> str:
    """Return the split of a document: a function of its text, so that copies of it stay together.

    A single split takes every document.
    """
    if len(splits) == 1:
        return splits[0]
    draw = int.from_bytes(blake2b(document.encode(), digest_size=8).digest(), "big") / 2**64
    return "val" if draw < val_fraction else "train"


def _document_source(options: ConvertOptions) -> Callable[[], Iterator[str]]:
    """Return a function that starts reading the corpus from its beginning."""
    if options.dataset == "demo":
        demo = list(limited(demo_documents(), max_docs=options.max_docs, max_bytes=options.max_bytes))
        return lambda: iter(demo)
    read = {"separator": options.doc_separator, "column": options.text_column}
    limits = {"max_docs": options.max_docs, "max_bytes": options.max_bytes}
    return lambda: limited(read_documents(options.input, **read), **limits)


def _trained_tokenizer(
    options: ConvertOptions, vocab_size: int, documents: Callable[[], Iterator[str]]
) -> PreTrainedTokenizerFast:
    """Train on the train split; what is held out is not learned from, unless it is all there is."""
    split = options.splits[0]

    def known() -> Iterator[str]:
        own = (text for text in documents() if split_of(text, options.splits, options.held_out) == split)
        return limited(own, max_docs=None, max_bytes=_TOKENIZER_TRAINING_BYTES)

    return train_wordpiece(known, vocab_size)


def _writer(options: ConvertOptions, folder: Path, tokenizer: PreTrainedTokenizerFast | None) -> SplitWriter:
    if options.concat_tokens is None:
        return TextWriter(folder, compression=options.compression)
    assert tokenizer is not None, "validate() refuses it"
    return TokenWriter(
        folder,
        tokenizer,
        options.concat_tokens,
        bos=_marker(tokenizer, options.bos_text, ("cls_token", "bos_token")),
        eos=_marker(tokenizer, options.eos_text, ("sep_token", "eos_token")),
        compression=options.compression,
    )


def _marker(tokenizer: PreTrainedTokenizerFast, text: str | None, roles: tuple[str, ...]) -> list[int]:
    """Return the ids of a given text, or of the first of the roles that the tokenizer fills, or none."""
    filled = (str(token) for role in roles if (token := getattr(tokenizer, role)))
    text = next(filled, "") if text is None else text
    return tokenizer.encode(text, add_special_tokens=False)


def _write_all(
    documents: Iterable[str], writers: dict[str, SplitWriter], val_fraction: float
) -> dict[str, SplitSummary]:
    """Hand every document to its split's writer, with a progress bar."""
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    splits = tuple(writers)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("reading", total=None)
        done = 0
        for batch in _batches(documents):
            for split in splits:
                own = [document for document in batch if split_of(document, splits, val_fraction) == split]
                if own:
                    writers[split].write(own)
            done += len(batch)
            seconds = max(progress.tasks[0].elapsed or 0.0, 1e-3)
            size = sum(writer.summary.text_bytes for writer in writers.values())
            progress.update(task, description=f"{done:,} documents  {done / seconds:,.0f}/s  {size / 1e6:,.1f} MB")
    return {split: writer.finish() for split, writer in writers.items()}


def _batches(documents: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    chars = 0
    for document in documents:
        batch.append(document)
        chars += len(document)
        if len(batch) >= _BATCH_DOCUMENTS or chars >= _BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _check_rows(summaries: dict[str, SplitSummary], options: ConvertOptions) -> None:
    for split, summary in summaries.items():
        if summary.samples == 0:
            size = f"fills no row of {options.concat_tokens} tokens" if summary.documents else "got no document"
            raise UserError(f"the {split} split {size}; give more text, a larger --val_fraction or fewer --splits")


def parse_options(arguments: list[str] | None = None) -> ConvertOptions:
    """Read the command line."""
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.convert",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--dataset", choices=DATASETS, required=True, help="the built-in demo corpus, or your text files")
    add("--input", nargs="+", type=Path, default=(), metavar="FILE", help=f"files to convert: {SUPPORTED}")
    add("--out_root", type=Path, required=True, metavar="DIR", help="folder to make")
    add("--splits", nargs="+", choices=SPLITS, default=SPLITS, help="one split alone takes every document")
    add(
        "--val_fraction",
        type=float,
        metavar="SHARE",
        help="of the documents, held out (default: 0.02; demo: 0.05)",
    )
    add("--tokenizer", metavar="NAME_OR_PATH", help="Hugging Face name, folder, vocab.txt or tokenizer.json")
    add(
        "--train_tokenizer",
        type=int,
        metavar="VOCAB_SIZE",
        help="train a lower-case WordPiece on the train split",
    )
    add("--concat_tokens", type=int, metavar="N", help="write rows of N token ids instead of texts")
    add("--bos_text", metavar="TEXT", help="begins every row (default: the tokenizer's [CLS] or BOS)")
    add("--eos_text", metavar="TEXT", help="ends every row and document (default: [SEP] or EOS)")
    add("--compression", metavar="NAME", help="compress the shards, e.g. zstd")
    add(
        "--doc_separator",
        choices=SEPARATORS,
        default="blank",
        help="ends a document of a text file (default: blank)",
    )
    add(
        "--text_column",
        default="text",
        metavar="NAME",
        help="field of .jsonl and .parquet files (default: text)",
    )
    add("--max_docs", type=int, metavar="N", help="stop after N documents")
    add("--max_bytes", type=int, metavar="N", help="stop after N bytes of text")
    given = vars(parser.parse_args(arguments))
    given["splits"] = tuple(split for split in SPLITS if split in given["splits"])
    return ConvertOptions(**{**given, "input": tuple(given["input"])})


def main(arguments: list[str]) -> None:
    """Convert as the command line says, and print what was written."""
    options = parse_options(arguments)
    manifest = convert(options)
    for split in options.splits:
        facts = manifest["splits"][split]
        tokens = f", {facts['tokens']:,} tokens" if facts["tokens"] else ""
        size = f"{facts['text_bytes'] / 1e6:,.2f} MB"
        print(f"{split}: {facts['documents']:,} documents, {size}, {facts['samples']:,} samples{tokens}")
    if manifest["unigram_entropy_nats"] is not None:
        print(f"unigram entropy of the train split: {manifest['unigram_entropy_nats']:.3f} nats per token")
    if manifest["tokenizer"]:
        print(f"tokenizer: {options.out_root / 'tokenizer'} ({manifest['tokenizer']['vocab_size']:,} entries)")
    print(f"written to {options.out_root} (data_local={options.out_root})")


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
