"""Fills masks with a trained model, to see with one's own eyes what it has learnt."""

import os
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from anymixer.config import PretrainConfig
from anymixer.errors import UserError
from anymixer.export.load import load_model
from anymixer.pretrain import CONFIG_NAME

# Tokens of a held-out row to show.
SPAN = 48


def load_run(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerFast, PretrainConfig]:
    """The model (evaluation mode, CPU), tokenizer and configuration that `main.py` saved in `folder`.

    Raises UserError when the folder is no run or holds no whole checkpoint.
    """
    loaded = load_model(str(folder))
    if loaded.config is None:
        raise UserError(f"{folder}: no run is there ({CONFIG_NAME} is missing); give the run's save_folder")
    return loaded.model, loaded.tokenizer, loaded.config


def fill_and_print(source: str, texts: list[str], *, examples: int, top: int) -> None:
    """Print each text with its masks and the model's `top` words for each, with their probabilities.

    source: names the model's checkpoint; see `open_checkpoint`. examples: number of rows of the run's own held-out data
    to mask one word in, besides `texts`.
    """
    if not texts and not examples:
        raise UserError("texts: none given; write a text with [MASK] in it, or --examples 4")
    loaded = load_model(source)
    if loaded.auto_class != "AutoModelForMaskedLM":
        kind = type(loaded.model).__name__
        raise UserError(f"{source}: its model ({kind}) fills no masks; of a language model, see `anymixer generate`")
    model, tokenizer, config = loaded.model, loaded.tokenizer, loaded.config
    mask = str(tokenizer.mask_token)
    table = Table("text", "answer", f"best {top}", show_lines=True)
    for text in texts:
        if mask not in text:
            raise UserError(f"texts: no {mask} in: {text}")
        table.add_row(text, "", _guesses(model, tokenizer, torch.tensor([tokenizer.encode(text)]), top))
    for ids, answer in _held_out(config, tokenizer, examples):
        table.add_row(_shown(tokenizer, ids), answer, _guesses(model, tokenizer, ids, top))
    Console().print(table)


@torch.no_grad()
def _guesses(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, ids: Tensor, top: int) -> str:
    """The likeliest words of each mask in ids [1, length], a line a mask."""
    logits = model(input_ids=ids).logits[ids == tokenizer.mask_token_id]
    likely = logits.softmax(-1).topk(top)
    words = [tokenizer.convert_ids_to_tokens(row.tolist()) for row in likely.indices]
    lines = (zip(w, p.tolist()) for w, p in zip(words, likely.values))
    return "\n".join(", ".join(f"{word} {share:.0%}" for word, share in line) for line in lines)


def _held_out(
    config: PretrainConfig | None, tokenizer: PreTrainedTokenizerFast, count: int
) -> list[tuple[Tensor, str]]:
    """Spans of held-out text [1, length] with one whole word of letters masked, and that word."""
    spans = []
    for row in held_out_rows(config, tokenizer, count) if count else []:
        ids = row[:SPAN]
        words = [str(tokenizer.convert_ids_to_tokens(token_id)) for token_id in ids]
        if place := _maskable(words):
            ids[place] = tokenizer.vocab[str(tokenizer.mask_token)]
            spans.append((torch.tensor([ids]), words[place]))
    return spans


def held_out_rows(config: PretrainConfig | None, tokenizer: PreTrainedTokenizerFast, count: int) -> list[list[int]]:
    """The ids of `count` rows, spread evenly over the run's own held-out data; UserError when that is gone."""
    if config is None:
        raise UserError(f"no {CONFIG_NAME} of a run lies beside the model, so its held-out data is unknown; give texts")
    source = config.eval_loader.dataset
    if source.local is None or not (Path(source.local) / str(source.split)).is_dir():
        raise UserError(f"the run's held-out data is not at {source.local}; give texts of your own")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from streaming import LocalDataset

    dataset = LocalDataset(source.local, split=source.split)
    places = range(0, len(dataset), max(1, len(dataset) // count))[:count]
    samples = (dataset[place] for place in places)
    return [s["tokens"].tolist() if "tokens" in s else tokenizer.encode(s["text"]) for s in samples]


def _maskable(tokens: list[str]) -> int | None:
    """The place nearest the middle whose token is a whole word of at least three letters."""
    whole = [
        i
        for i in range(1, len(tokens) - 1)
        if tokens[i].isalpha() and len(tokens[i]) > 2 and not tokens[i + 1].startswith("##")
    ]
    return min(whole, key=lambda i: abs(i - len(tokens) // 2), default=None)


def _shown(tokenizer: PreTrainedTokenizerFast, ids: Tensor) -> str:
    special = [tokenizer.cls_token, tokenizer.sep_token, tokenizer.pad_token]
    tokens = [t for t in tokenizer.convert_ids_to_tokens(ids[0].tolist()) if t not in special]
    return tokenizer.convert_tokens_to_string(tokens)
