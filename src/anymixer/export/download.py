"""Fetches checkpoints from object stores and web servers, through Composer, which writes them there."""

from pathlib import Path, PurePosixPath
from typing import Any

from anymixer.errors import UserError
from anymixer.models.checkpoint_shards import METADATA
from anymixer.training.checkpoints import LATEST, checkpoint_names

# Of a run's folder: what the checkpoint alone does not say.
_BESIDE = ("config.yaml", "metrics.jsonl")


def download(url: str, folder: Path) -> Path:
    """Fetch the checkpoint at `url` into `folder`: a `.pt` file, a folder of shards, or a run's folder, of which its
    newest checkpoint and what lies beside it is taken. Returns the file or folder of shards.

    Raises UserError for a store that is not known, cannot be reached, or holds nothing there.
    """
    if url.startswith(("http://", "https://")):
        return _fetch_file(url, url, None, folder)
    store, path = _open_store(url)
    if path.endswith((".pt", ".symlink")):
        return _fetch_file(url, path, store, folder)
    prefix = f"{path.rstrip('/')}/"
    names = {name.removeprefix(prefix): name for name in _listed(url, prefix, store)}
    if METADATA in names:
        return _fetch_folder(url, names, store, folder / PurePosixPath(path).name)
    for name in _BESIDE:
        if name in names:
            _fetch_file(url, names[name], store, folder)
    newest = next(reversed(checkpoint_names({name.partition("/")[0] for name in names})), None)
    if newest is not None and f"{newest}/{METADATA}" in names:
        shards = {
            name.removeprefix(f"{newest}/"): full for name, full in names.items() if name.startswith(f"{newest}/")
        }
        return _fetch_folder(url, shards, store, folder / newest)
    found = newest or next((name for name in (LATEST, f"{LATEST}.symlink") if name in names), None)
    if found is None:
        raise UserError(f"{url}: no checkpoint is there; give the URL of a run's save_folder or of a checkpoint")
    return _fetch_file(url, names[found], store, folder)


def _open_store(url: str) -> tuple[Any, str]:
    from composer.utils import maybe_create_object_store_from_uri, parse_uri

    try:
        return maybe_create_object_store_from_uri(url), parse_uri(url)[2]
    except NotImplementedError as error:
        raise UserError(f"{url}: no object store of that kind is known: {_one_line(error)}") from error
    except Exception as error:  # a missing client, credentials: every store raises classes of its own
        raise UserError(f"{url}: cannot be opened: {_one_line(error)}") from error


def _listed(url: str, prefix: str, store: Any) -> list[str]:
    try:
        return store.list_objects(prefix)
    except Exception as error:  # every store raises classes of its own
        raise UserError(f"{url}: cannot be listed: {_one_line(error)}") from error


def _fetch_folder(url: str, names: dict[str, str], store: Any, folder: Path) -> Path:
    """Fetch files, by their names in the folder, which have no folders of their own."""
    folder.mkdir()
    for name, full in names.items():
        if "/" not in name:
            _fetch_file(url, full, store, folder)
    return folder


def _fetch_file(url: str, path: str, store: Any, folder: Path) -> Path:
    from composer.utils import get_file

    name = PurePosixPath(path.partition("?")[0]).name.removesuffix(".symlink")
    target = folder / name
    try:
        get_file(path, str(target), store, progress_bar=False)
    except FileNotFoundError as error:
        raise UserError(f"{url}: there is no such file") from error
    except Exception as error:  # every store raises classes of its own
        raise UserError(f"{url}: cannot be fetched: {_one_line(error)}") from error
    return target


def _one_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
