"""Real text to compare models on: rows of a run's held-out data, or sentences that come with this package."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SENTENCES = (
    "The ferry leaves at half past six, unless the wind turns to the north.",
    "Why did the committee, after months of hearings, publish nothing at all?",
    "She counted 1,024 steps, rested, and counted them again; there were 1,023.",
    "Proteins fold within milliseconds into shapes that no computer could enumerate.",
    'He said: "Bring the ladder," and nobody moved.',
    "Rain.",
)
# Tokens of the longest row; the others are shorter, so that padding is compared too.
LONGEST = 96


def held_out_rows(run: Mapping[str, Any], tokenizer: "PreTrainedTokenizerFast", count: int = 4) -> list[list[int]]:
    """Token ids of rows that a run was evaluated on, of different lengths; none where its data is not on this machine.

    run: the resolved configuration.
    """
    source = (run.get("eval_loader") or {}).get("dataset") or {}
    local, split = source.get("local") or run.get("data_local"), source.get("split") or "val"
    if not local or not (Path(local) / split / "index.json").is_file():
        return []
    from streaming import LocalDataset

    dataset = LocalDataset(str(local), split=str(split))
    step = max(1, len(dataset) // count)
    samples = [dataset[i] for i in range(0, len(dataset), step)][:count]
    ids = [s["tokens"].tolist() if "tokens" in s else tokenizer.encode(s["text"]) for s in samples]
    return [row[: LONGEST - 7 * place] for place, row in enumerate(ids)]


def sentence_rows(tokenizer: "PreTrainedTokenizerFast") -> list[list[int]]:
    """SENTENCES as token ids."""
    return [tokenizer.encode(sentence) for sentence in SENTENCES]


def arbitrary_rows(vocab_size: int) -> list[list[int]]:
    """Ids to compare a model on that has no tokenizer: different lengths, spread over the vocabulary."""
    return [[(place * 7919 + length) % vocab_size for place in range(length)] for length in (48, 21, 1)]
