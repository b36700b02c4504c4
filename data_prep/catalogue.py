"""Corpora on the Hugging Face Hub that have a short name here, and where their splits come from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

# Documents of MosaicBERT's small splits: the first ones of the large split they are named after.
SMALL_SPLITS = {"train_small": ("train", 100_000), "val_small": ("val", 10_000)}


@dataclass(frozen=True)
class HubCorpus:
    """A corpus on the Hub.

    Args:
        path: its name there.
        subset: the configuration taken by default.
        splits: our name of a split -> the corpus's; empty where the corpus has one split alone, of which a
            share is held out by each document's text.
        documents: how many a split of the default subset has, where known.
    """

    path: str
    subset: str | None = None
    splits: dict[str, str] = field(default_factory=dict)
    documents: dict[str, int] = field(default_factory=dict)


CATALOGUE = {
    "c4": HubCorpus(
        "allenai/c4",
        subset="en",
        splits={"train": "train", "val": "validation"},
        documents={"train": 364_868_892, "val": 364_608},
    ),
    # The original was withdrawn; this is the same text without the parts under copyright.
    "the_pile": HubCorpus("monology/pile-uncopyrighted", splits={"train": "train", "val": "validation"}),
    "wikipedia": HubCorpus("wikimedia/wikipedia", subset="20231101.en"),
}
VALIDATION_NAMES = ("validation", "val", "valid", "dev")


def expected_documents(dataset: str, subset: str | None, split: str) -> int | None:
    """Return how many documents a split of a known corpus has, None where that is not known."""
    corpus = CATALOGUE.get(dataset)
    if corpus is None or subset not in (None, corpus.subset):
        return None
    large, count = SMALL_SPLITS.get(split, (split, None))
    return count if count is not None and large in corpus.documents else corpus.documents.get(large)


def is_remote(place: Path | str) -> bool:
    """Tell whether a place is a URL."""
    return "://" in str(place)
