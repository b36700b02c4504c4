"""The remote folder of a conversion: Amazon S3 (or a compatible store), Google Cloud Storage, the Hugging Face Hub."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlsplit

from anymixer.errors import UserError

_ATTEMPTS = 5  # streaming waits 0.5 s before the second, and longer before each next one
_DOWNLOAD_SECONDS = 120
_HUB_PREFIX = "hf://datasets/"


class Remote(Protocol):
    """A remote folder and the local one that holds the same names, relative to both."""

    def upload(self, names: Iterable[str]) -> None:
        """Copy local files there."""
        ...

    def download(self, names: Iterable[str]) -> None:
        """Copy files from there, replacing local ones."""
        ...

    def names(self, beginning: str) -> set[str]:
        """Return the names of its files that begin so."""
        ...


@lru_cache(maxsize=2)
def open_remote(url: str, local: Path) -> Remote:
    """Return the remote folder at a URL that begins with s3, gs or hf.

    `S3_ENDPOINT_URL` names a store other than Amazon's. Credentials are those of each client.

    Raises:
        UserError: it cannot be reached or written to.
    """
    local.mkdir(parents=True, exist_ok=True)
    try:
        return HubFolder(url, local) if url.startswith("hf://") else ObjectStore(url, local)
    except UserError:
        raise
    except Exception as error:  # each client has its own kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"--out_root: {url} cannot be opened ({reason})") from error


class ObjectStore:
    """A folder in an object store, through streaming's own clients, which try again with back-off."""

    def __init__(self, url: str, local: Path) -> None:
        from streaming.base.storage.upload import CloudUploader

        # It warns of every file that is in the local folder already.
        logging.getLogger("streaming.base.storage.upload").setLevel(logging.ERROR)
        self._url = url.rstrip("/")
        self._local = local
        self._client: Any = CloudUploader.get((str(local), self._url), keep_local=True, retry=_ATTEMPTS, exist_ok=True)

    def upload(self, names: Iterable[str]) -> None:
        """Copy local files there."""
        for name in names:
            self._client.upload_file(name)

    def download(self, names: Iterable[str]) -> None:
        """Copy files from there, replacing local ones."""
        from streaming.base.storage.download import CloudDownloader

        client = CloudDownloader.get(self._url)
        for name in names:
            target = self._local / name
            target.unlink(missing_ok=True)  # the client leaves a file alone that is there
            client.download(f"{self._url}/{name}", str(target), _DOWNLOAD_SECONDS)
        client.clean_up()

    def names(self, beginning: str) -> set[str]:
        """Return the names of its files that begin so."""
        prefix = urlsplit(self._url).path.strip("/")
        keys = self._client.list_objects(beginning) or []
        return {key.removeprefix(prefix).lstrip("/") for key in keys}


class HubFolder:
    """A folder of a dataset repository on the Hub; what is uploaded at once is one commit.

    Streaming's own client leaves out the folders of the URL, and makes a commit of every file, which the Hub
    limits to about a hundred an hour.
    """

    def __init__(self, url: str, local: Path) -> None:
        import huggingface_hub

        parts = url.removeprefix(_HUB_PREFIX).strip("/").split("/")
        if not url.startswith(_HUB_PREFIX) or len(parts) < 2:
            raise UserError(f"--out_root: {url}: give {_HUB_PREFIX}OWNER/NAME or a folder below it")
        self._repository, self._folder = "/".join(parts[:2]), "/".join(parts[2:])
        self._local = local
        self._api = huggingface_hub.HfApi()
        self._api.repo_info(self._repository, repo_type="dataset")  # raises if it is not there

    def upload(self, names: Iterable[str]) -> None:
        """Copy local files there."""
        from huggingface_hub import CommitOperationAdd

        files = list(names)
        operations = [CommitOperationAdd(self._path(name), self._local / name) for name in files]
        self._api.create_commit(
            self._repository,
            operations,
            repo_type="dataset",
            commit_message=f"Add {files[0]}" + (f" and {len(files) - 1} more" if files[1:] else ""),
        )

    def download(self, names: Iterable[str]) -> None:
        """Copy files from there, replacing local ones."""
        import shutil

        for name in names:
            cached = self._api.hf_hub_download(self._repository, self._path(name), repo_type="dataset")
            target = self._local / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(cached, target)

    def names(self, beginning: str) -> set[str]:
        """Return the names of its files that begin so."""
        files = self._api.list_repo_files(self._repository, repo_type="dataset")
        own = f"{self._folder}/" if self._folder else ""
        return {file[len(own) :] for file in files if file.startswith(own + beginning)}

    def _path(self, name: str) -> str:
        return f"{self._folder}/{name}" if self._folder else name
