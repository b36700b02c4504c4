"""How fast the loader gives batches, without a model: rows made beforehand against text tokenized on the fly.

    python benchmarks/data_loader.py data/wiki_packed data/wiki_text --tokenizer data/wiki_packed/tokenizer

Each folder is one that data_prep made; rows of text are cut and padded to --max_seq_len. Counted are real tokens,
from the first batch's arrival on, in alternating runs, of which the median counts. Reads from the
machine's file cache, so it measures the loader and not a disk.
"""

import argparse
import statistics
import time
from itertools import islice
from pathlib import Path

from rich.console import Console
from rich.table import Table

from anymixer.data import DatasetConfig, LoaderConfig, build_loader, load_tokenizer
from anymixer.data.loader import count_tokens
from anymixer.data.shards import read_index


def tokens_per_second(loader: object, batches: int) -> tuple[float, float]:
    """Read one epoch as far as `batches`; return real tokens a second, and their share of the positions."""
    iterator = iter(loader)  # pyright: ignore[reportArgumentType]
    next(iterator)
    begin, tokens, positions = time.perf_counter(), 0, 0
    for batch in islice(iterator, batches):
        tokens += count_tokens(batch)["total"]
        positions += batch["labels"].numel()
    return tokens / (time.perf_counter() - begin), tokens / positions


def main() -> None:
    """Parse arguments, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--max_seq_len", type=int, default=512)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=150, help="batches of pre-tokenized rows in a run")
    parser.add_argument("--text_batches", type=int, default=20, help="batches of texts in a run")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--masking", default="bert")
    parser.add_argument("--repeat", type=int, default=3)
    options = parser.parse_args()
    tokenizer = load_tokenizer(options.tokenizer)
    loaders, limits = {}, {}
    for folder in options.folders:
        settings = DatasetConfig(local=str(folder), max_seq_len=options.max_seq_len, masking=options.masking)
        config = LoaderConfig(num_workers=options.workers, dataset=settings)
        spec = build_loader(config, tokenizer, device_batch_size=options.batch, seed=1, train=True)
        text = "text" in read_index(folder / "train")[0].columns
        loaders[folder], limits[folder] = spec.dataloader, options.text_batches if text else options.batches
    runs = {folder: [] for folder in loaders}
    for _ in range(options.repeat):
        for folder, loader in loaders.items():
            runs[folder].append(tokens_per_second(loader, limits[folder]))
    rates = {folder: statistics.median(rate for rate, _ in found) for folder, found in runs.items()}
    slowest = min(rates.values())
    table = Table("folder", "Mtok/s", "x slowest", "real tokens", "spread")
    for folder, found in runs.items():
        spread = (max(rate for rate, _ in found) - min(rate for rate, _ in found)) / rates[folder]
        ratio = rates[folder] / slowest
        table.add_row(str(folder), f"{rates[folder] / 1e6:.3f}", f"{ratio:.1f}", f"{found[0][1]:.1%}", f"{spread:.0%}")
    print(f"rows of {options.max_seq_len}, batches of {options.batch}, {options.workers} workers, {options.masking}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
