"""Two small GLUE-format tasks from the demo corpus: `python -m data_prep.demo_glue --out_root data/demo-glue`.

- acceptability: is a sentence as it was written (1), or are its words shuffled (0)?
- sentence_pairs: do a paragraph's first two sentences stand as they belong together (1), or the wrong way round (0)?

Half of the examples are of each kind, so chance is 50 %. A document's sentences are all in the training set or all
in the validation set. The tables have the columns and names of GLUE on the Hub: `acceptability/train.parquet`.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from anymixer.entry_point import ArgumentParser, run
from anymixer.errors import UserError

# After a full stop that follows a word, before a capital letter.
_SENTENCE_END = re.compile(r"(?<=[a-z)\"'][.!?])\s+(?=[A-Z])")
_MIN_WORDS, _MAX_WORDS = 6, 24
# One document in ten is for validation.
_HELD_OUT = 10
SPLITS = ("train", "validation")

Rows = dict[str, list[Any]]


def main(arguments: list[str]) -> None:
    """Make the two tasks below --out_root, unless they are there already."""
    parser = ArgumentParser(
        prog="python -m data_prep.demo_glue",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out_root", type=Path, required=True, help="folder for the two tasks")
    parser.add_argument("--train", type=int, default=4000, help="examples to train each task on, at most")
    parser.add_argument("--validation", type=int, default=500, help="examples to score each task on, at most")
    parser.add_argument("--seed", type=int, default=17, help="of what is drawn and shuffled")
    options = parser.parse_args(arguments)
    if min(options.train, options.validation) < 2:
        raise UserError("--train, --validation: must be at least 2, one of each kind")
    from data_prep.demo_corpus import demo_documents

    sizes = {"train": options.train, "validation": options.validation}
    write_tasks(make_tasks(demo_documents(), sizes, options.seed), options.out_root)


def make_tasks(documents: Iterable[str], sizes: dict[str, int], seed: int) -> dict[str, dict[str, Rows]]:
    """Return task -> split -> columns.

    documents: paragraphs, one on a line. sizes: the most examples of each split.
    """
    held: dict[str, list[list[list[str]]]] = {split: [] for split in SPLITS}
    for number, document in enumerate(documents):
        paragraphs = [sentences(line) for line in document.split("\n")]
        held[SPLITS[number % _HELD_OUT == 0]].append(paragraphs)
    tasks: dict[str, dict[str, Rows]] = {"acceptability": {}, "sentence_pairs": {}}
    for split, size in sizes.items():
        tasks["acceptability"][split] = acceptability(held[split], size, random.Random(f"{seed} {split}"))
        tasks["sentence_pairs"][split] = sentence_pairs(held[split], size, random.Random(f"{seed} {split}"))
    return tasks


def sentences(paragraph: str) -> list[str]:
    """Cut a paragraph into its sentences."""
    return _SENTENCE_END.split(paragraph)


def acceptability(documents: Sequence[Sequence[list[str]]], size: int, rng: random.Random) -> Rows:
    """Sentences as written, and with their words shuffled; capital letters and full stops give nothing away."""
    found = [s for document in documents for paragraph in document for s in paragraph if _fits(s)]
    found = rng.sample(found, min(size, len(found)))
    rows: Rows = {"sentence": [], "label": [], "idx": []}
    for number, sentence in enumerate(found):
        words = _plain(sentence)
        label = number % 2
        if label == 0:
            before = list(words)
            while words == before:
                rng.shuffle(words)
        rows["sentence"].append(" ".join(words))
        rows["label"].append(label)
        rows["idx"].append(number)
    return rows


def sentence_pairs(documents: Sequence[Sequence[list[str]]], size: int, rng: random.Random) -> Rows:
    """The first two sentences of paragraphs, as they stand and the other way round."""
    pairs = [p[:2] for document in documents for p in document if len(p) > 1 and _fits(p[0]) and _fits(p[1])]
    rows: Rows = {"sentence1": [], "sentence2": [], "label": [], "idx": []}
    for number, pair in enumerate(rng.sample(pairs, min(size, len(pairs)))):
        label = number % 2
        first, second = pair if label else reversed(pair)
        for column, value in zip(rows.values(), (first, second, label, number)):
            column.append(value)
    return rows


def _fits(sentence: str) -> bool:
    return _MIN_WORDS <= len(sentence.split()) <= _MAX_WORDS and len(set(_plain(sentence))) > 2


def _plain(sentence: str) -> list[str]:
    """The words in lower case, without the marks at the sentence's end."""
    return sentence.lower().rstrip(".!?:;)\"'").split()


def write_tasks(tasks: dict[str, dict[str, Rows]], out_root: Path) -> None:
    """Write every split as a parquet file, each whole or not at all."""
    import pyarrow
    from pyarrow import parquet

    for name, splits in tasks.items():
        for split, rows in splits.items():
            path = out_root / name / f"{split}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            half = path.with_name(f".{path.name}.{os.getpid()}")
            parquet.write_table(pyarrow.table(rows), half)
            os.replace(half, path)
            print(f"{path}: {len(rows['label']):,} examples")


if __name__ == "__main__":
    sys.exit(run(main, sys.argv[1:]))
