"""Documents of a dataset on the Hugging Face Hub, or of a local folder that the `datasets` library can load."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from anymixer.errors import UserError


def split_names(path: str, subset: str | None) -> list[str]:
    """Return the names of a dataset's splits.

    Raises:
        UserError: no such dataset or subset, or the Hub cannot be reached.
    """
    import datasets

    with _named(path):
        _check_hub_is_there(path)
        return list(datasets.get_dataset_split_names(path, subset))


def revision_of(path: str) -> str | None:
    """Return the commit that the Hub serves now, so that every later start reads the same; None for a folder."""
    import huggingface_hub

    if Path(path).exists():
        return None
    with _named(path):
        return huggingface_hub.HfApi().dataset_info(path).sha


def shard_count(path: str, subset: str | None, split: str, revision: str | None) -> int:
    """Return in how many files a split lies; each can be read by itself."""
    return _opened(path, subset, split, revision).num_shards


def read_shards(
    path: str, subset: str | None, split: str, revision: str | None, *, shards: tuple[int, ...], column: str
) -> Iterator[str]:
    """Yield the documents of some shards of a split, in order; empty ones and nulls are left out.

    Raises:
        UserError: the dataset cannot be read, or has no text column of that name.
    """
    dataset = _opened(path, subset, split, revision)
    for number in shards:
        with _named(path):
            rows = iter(dataset.shard(num_shards=dataset.num_shards, index=number))
        while True:
            with _named(path):
                row = next(rows, None)
            if row is None:
                break
            text = row.get(column)
            if text is not None and not isinstance(text, str):
                raise UserError(f"--text_column: column '{column}' of {path} holds no text")
            if column not in row:
                raise UserError(f"{path}: no column '{column}' (it has: {', '.join(row)}); see --text_column")
            if text and (text := text.strip()):
                yield text


def _check_hub_is_there(path: str) -> None:
    """Raise OSError at once where the Hub's name does not resolve: its client would try for half a minute."""
    from urllib.request import getproxies

    from huggingface_hub.constants import ENDPOINT

    if not Path(path).exists() and not getproxies():
        socket.getaddrinfo(urlsplit(ENDPOINT).hostname, None)


def _opened(path: str, subset: str | None, split: str, revision: str | None) -> Any:
    import datasets

    with _named(path):
        return datasets.load_dataset(path, subset, split=split, revision=revision, streaming=True)


@contextmanager
def _named(path: str) -> Iterator[None]:
    """Turn what goes wrong with a dataset into one line that names it."""
    import requests
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (OSError, ValueError, DatasetsError, requests.RequestException) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"--dataset: {path} cannot be read ({reason}); with files of it here, use --input") from error
