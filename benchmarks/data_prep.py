"""What converting a corpus costs, against the bare tokenizer on the same documents and cores; how full rows are.

    python -m benchmarks.data_prep wiki.part0.txt.xz books.txt.xz --tokenizer bert-base-uncased
    python -m benchmarks.data_prep wiki.part*.txt.xz --tokenizer FOLDER --rows pack:128 --megabytes 0 --cores 8

Bare: `encode_batch` of the `tokenizers` library, and its form without offsets, on documents in memory. A conversion
reads files, decompresses, hashes, tokenizes, packs, and writes shards. Both are measured in turns: on one core in
processor seconds, which other programs do not change much; on several by the clock, the start of the processes
included, which import their libraries in the first turn only. The medians are given.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from anymixer.data import load_tokenizer
from data_prep.convert import convert
from data_prep.options import ConvertOptions
from data_prep.sources import TextFormat, limited, read_file
from data_prep.tokenizing import batches

FLAGS = {"pack": "pack_tokens", "concat": "concat_tokens", "sequence": "sequence_tokens"}


def sample(files: Sequence[Path], megabytes: int) -> list[str]:
    """Return the first documents of each file, in equal parts; 0 for all of them."""
    limit = megabytes * 1_000_000 // len(files) if megabytes else None
    return [text for path in files for text in limited(read_file(path, TextFormat()), max_docs=None, max_bytes=limit)]


def tokenize(documents: list[str], tokenizer: Any, method: str, cores: int) -> int:
    """Tokenize documents as a program would that does nothing else; return how many tokens there are."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if cores > 1 else "false"
    encode = getattr(tokenizer, method)
    return sum(len(each) for group in batches(documents) for each in encode(group, add_special_tokens=False))


def compare(options: ConvertOptions, documents: list[str], tokenizer: Any, repeat: int) -> dict[str, Any]:
    """Convert and tokenize the same documents in turns; return the medians and what was written."""
    clock = time.process_time if options.workers == 1 else time.perf_counter
    seconds: dict[str, list[float]] = {"convert": [], "encode_batch": [], "encode_batch_fast": []}
    tokens = facts = None
    for _ in range(repeat):
        with tempfile.TemporaryDirectory() as folder:
            made = ConvertOptions(**{**vars(options), "out_root": Path(folder) / "out"})
            start = clock()
            manifest = convert(made)
            seconds["convert"].append(clock() - start)
            assert manifest is not None
            facts = manifest["splits"]["train"]
        for method in ("encode_batch", "encode_batch_fast"):
            start = clock()
            tokens = tokenize(documents, tokenizer, method, options.workers)
            seconds[method].append(clock() - start)
    assert facts is not None and facts["documents"] == len(documents) and facts["document_tokens"] == tokens
    return {"tokens": tokens, "facts": facts, **{name: statistics.median(each) for name, each in seconds.items()}}


def main() -> None:
    """Print a table of the rates and of how full the rows are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--rows", nargs="+", default=["pack:128", "pack:512", "pack:2048", "concat:128"])
    parser.add_argument("--megabytes", type=int, default=30, help="of text to convert; 0 for all")
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    given = parser.parse_args()
    os.environ["RAYON_NUM_THREADS"] = str(given.cores)
    documents = sample(given.files, given.megabytes)
    tokenizer = load_tokenizer(given.tokenizer)
    backend = tokenizer.backend_tokenizer
    with tempfile.TemporaryDirectory() as folder:
        files = tuple(given.files)
        if given.megabytes:
            files = (Path(folder) / "sample.txt",)
            files[0].write_text("\n\n".join(documents))
        title = (
            f"{len(documents):,} documents, {sum(map(len, documents)) / 1e6:,.0f}M characters, {given.cores} core(s)"
        )
        table = Table(title=title)
        headings = (
            "rows",
            "tokens/s",
            "encode_batch tokens/s",
            "ratio",
            "fast tokens/s",
            "ratio",
            "filled",
            "sequences",
        )
        for heading in headings:
            table.add_column(heading, justify="right")
        for rows in given.rows:
            mode, _, length = rows.partition(":")
            form: dict[str, Any] = {FLAGS[mode]: int(length)}
            options = ConvertOptions(
                dataset="text",
                input=files,
                out_root=Path(folder),
                splits=("train",),
                tokenizer=given.tokenizer,
                num_workers=given.cores,
                **form,
            )
            result = compare(options, documents, backend, given.repeat)
            table.add_row(rows, *cells(result))
    Console(width=140).print(table)


def cells(result: dict[str, Any]) -> list[str]:
    """Return one row of the table: rates are of the documents' own tokens."""
    facts, tokens = result["facts"], result["tokens"]
    ours = tokens / result["convert"]
    cells = [f"{ours:,.0f}"]
    for method in ("encode_batch", "encode_batch_fast"):
        cells += [f"{tokens / result[method]:,.0f}", f"{result[method] / result['convert']:.2f}"]
    return [*cells, f"{facts['tokens'] / facts['positions']:.2%}", f"{facts['sequences']:,}"]


if __name__ == "__main__":
    main()
