"""Documents into token ids, in batches, while the batch before is being written."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer
    from transformers import PreTrainedTokenizerFast

BATCH_DOCUMENTS = 1024
BATCH_CHARS = 2_000_000


@dataclass(frozen=True)
class Vocabulary:
    """What a process needs of a tokenizer to write rows; plain values, so that processes can send it.

    Args:
        tokenizer: the `tokenizers` library's own form of it.
        size: number of entries.
        special: ids that count as no word.
        bos, eos: what begins and ends a row, or a sequence of it.
    """

    tokenizer: str
    size: int
    special: tuple[int, ...]
    bos: tuple[int, ...]
    eos: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype[np.unsignedinteger]:
        """The stored type of its ids."""
        return np.dtype(token_dtype(self.size))

    def backend(self) -> Tokenizer:
        """Return the tokenizer."""
        return _backend(self.tokenizer)


def vocabulary_of(tokenizer: PreTrainedTokenizerFast, bos_text: str | None, eos_text: str | None) -> Vocabulary:
    """Return a tokenizer's vocabulary.

    Args:
        bos_text, eos_text: begin and end a row; None for the tokenizer's [CLS] or BOS, and [SEP] or EOS.
    """
    return Vocabulary(
        tokenizer=tokenizer.backend_tokenizer.to_str(),
        size=len(tokenizer),
        special=tuple(tokenizer.all_special_ids),
        bos=_marker(tokenizer, bos_text, ("cls_token", "bos_token")),
        eos=_marker(tokenizer, eos_text, ("sep_token", "eos_token")),
    )


def token_dtype(vocab_size: int) -> type[np.uint16] | type[np.uint32]:
    """Return the smallest stored type that holds the ids of a vocabulary."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def batches(documents: Iterable[str]) -> Iterator[list[str]]:
    """Group documents into batches large enough to keep a tokenizer's threads busy."""
    batch: list[str] = []
    chars = 0
    for document in documents:
        batch.append(document)
        chars += len(document)
        if len(batch) >= BATCH_DOCUMENTS or chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def tokenized(
    groups: Iterable[list[str]], vocabulary: Vocabulary, *, threaded: Callable[[], bool]
) -> Iterator[tuple[list[str], list[NDArray[np.unsignedinteger]]]]:
    """Yield each batch of documents with their ids, without special tokens.

    A batch is tokenized, outside Python's lock, while the caller works on the batch before it.

    Args:
        threaded: asked before each batch whether the tokenizer may use the other cores too.
    """
    backend = vocabulary.backend()
    dtype = vocabulary.dtype

    def encode(group: list[str]) -> list[Encoding]:
        # Read by the tokenizers library at every call.
        os.environ["TOKENIZERS_PARALLELISM"] = "true" if threaded() else "false"
        return backend.encode_batch_fast(group, add_special_tokens=False)

    def result(group: list[str], encoding: Future[list[Encoding]]) -> tuple[list[str], list[NDArray]]:
        return group, [np.array(each.ids, dtype) for each in encoding.result()]

    with ThreadPoolExecutor(1) as thread:
        waiting: tuple[list[str], Future[list[Encoding]]] | None = None
        for group in groups:
            ready, waiting = waiting, (group, thread.submit(encode, group))
            if ready is not None:
                yield result(*ready)
        if waiting is not None:
            yield result(*waiting)


@lru_cache(maxsize=1)
def _backend(serialized: str) -> Tokenizer:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(serialized)


def _marker(tokenizer: PreTrainedTokenizerFast, text: str | None, roles: tuple[str, ...]) -> tuple[int, ...]:
    """Return the ids of a given text, or of the first of the roles that the tokenizer fills, or none."""
    filled = (str(token) for role in roles if (token := getattr(tokenizer, role)))
    text = next(filled, "") if text is None else text
    return tuple(tokenizer.encode(text, add_special_tokens=False))
