"""Finds and reads checkpoints: files, a run's or Hugging Face's folders, names on the Hub; runs nothing in them."""

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from anymixer.errors import UserError
from anymixer.models.checkpoint_weights import model_weights, read_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_WHOLE = ("latest-rank0.pt", "model.safetensors", "pytorch_model.bin")
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json")
# On the Hub, what to look for first; raw files of weights where there is nothing else.
_DESCRIPTION = ["*.json", "vocab.txt", "merges.txt"]
_PATTERNS = (["model*.safetensors"], ["pytorch_model*.bin"], ["*.pt", "*.pth"])
# A file of recorded numbers: parameters behind this, and perhaps an input with its logits.
_RECORDED = "state."


@dataclass(frozen=True)
class StoredWeights:
    """Weights under the names that they have in the files.

    name: as the user wrote it. config: of the model, as saved beside them, tokenizer: theirs; None where there is
    none. example: `input_ids` [batch, length] and the original's `logits` for them, where the file records them.
    """

    name: str
    files: tuple[Path, ...]
    weights: Mapping[str, Tensor]
    config: Mapping[str, Any] | None
    tokenizer: "PreTrainedTokenizerFast | None"
    example: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """SHA-256 over the weights' files."""
        return files_digest(self.files)


def open_weights(name: str, key: str) -> StoredWeights:
    """Read a checkpoint: a file of weights, a folder of Hugging Face, of a run or of shards, a name on the Hub.

    Raises UserError naming `key` for what cannot be found or read, or would run code when read.
    """
    files = weight_files(name, key)
    weights: dict[str, Tensor] = {}
    example: dict[str, Tensor] = {}
    config = tokenizer = None
    if files[0].suffix == ".safetensors":
        weights, notes = read_safetensors(files, key)
        config = json.loads(notes["config"]) if "config" in notes else None
        if any(part.startswith(_RECORDED) for part in weights):
            example = {part: weights.pop(part) for part in ("input_ids", "logits") if part in weights}
            weights = {part.removeprefix(_RECORDED): value for part, value in weights.items()}
    else:
        for file in files:
            content = read_checkpoint(file, key)
            weights |= model_weights(content, key)
            saved = _saved_by_composer(content)
            config = config or ((saved.get("model") or {}).get("config") or {}).get("content")
            tokenizer = tokenizer or tokenizer_inside(saved.get("tokenizer") or {})
    config = config or _config_beside(files[0], key)
    return StoredWeights(name, files, weights, config, tokenizer or tokenizer_beside(files[0]), example)


def weight_files(name: str, key: str) -> tuple[Path, ...]:
    """The files, or the one folder of shards, that hold the weights of what `name` names."""
    path = Path(name).expanduser()
    if path.is_file():
        return (path.resolve(),)
    if path.is_dir():
        return _files_of(path, key)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or path.suffix in _SUFFIXES:
        raise UserError(f"{key}: no such file or folder: {name}")
    return _files_of(_from_hub(name, key), key)


def files_digest(files: tuple[Path, ...]) -> str:
    """SHA-256 over files, and over those in folders of shards."""
    digest = hashlib.sha256()
    parts = [part for path in files for part in (sorted(path.iterdir()) if path.is_dir() else [path])]
    for path in parts:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _files_of(folder: Path, key: str) -> tuple[Path, ...]:
    if (folder / ".metadata").is_file():
        return (folder.resolve(),)
    for name in (*_WHOLE, *_INDEXES):
        file = folder / name
        if name in _WHOLE and file.exists():
            return (file.resolve(),)
        if name in _INDEXES and file.is_file():
            return _parts(file, key)
    raw = sorted(file for file in folder.iterdir() if file.suffix in _SUFFIXES and file.is_file())
    if len(raw) == 1:
        return (raw[0].resolve(),)
    if raw:
        found = f"several files of weights ({', '.join(file.name for file in raw[:4])}); name one of them"
    else:
        found = f"no checkpoint (no {', '.join((*_WHOLE, *_INDEXES))} or other {', '.join(_SUFFIXES)} file)"
    raise UserError(f"{key}: {folder} holds {found}")


def _parts(index: Path, key: str) -> tuple[Path, ...]:
    """The files that a Hugging Face index names, all of them in its folder."""
    parts = _json(index, key).get("weight_map", {}).values()
    files = tuple(index.parent / Path(part).name for part in sorted(set(parts)))
    if missing := [file.name for file in files if not file.is_file()]:
        raise UserError(f"{key}: {index.parent} is half a checkpoint: {', '.join(missing[:3])} missing")
    return files


def _from_hub(name: str, key: str) -> Path:
    """A snapshot of a model on the Hub, from the local cache where it is there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    failure: Exception | None = None
    for local in (True, False):
        for pattern in _PATTERNS:
            try:
                folder = Path(snapshot_download(name, allow_patterns=_DESCRIPTION + pattern, local_files_only=local))
            except (OSError, HfHubHTTPError, HFValidationError) as error:
                failure = error
                break
            if any(file.match(p) for file in folder.iterdir() for p in pattern):
                return folder
    raise UserError(
        f"{key}: '{name}' is neither a file nor a folder, and no weights can be fetched from the Hugging Face Hub"
    ) from failure


def read_safetensors(files: tuple[Path, ...], key: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of some safetensors files, and the notes at their heads."""
    from safetensors import SafetensorError, safe_open

    weights: dict[str, Tensor] = {}
    notes: dict[str, str] = {}
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                weights |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
                notes |= file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{key}: {path} is not a whole file of weights: {str(error)[:160]}") from error
    return weights, notes


def tokenizer_beside(file: Path) -> "PreTrainedTokenizerFast | None":
    """The tokenizer in the checkpoint's folder, or in `tokenizer` there, as runs leave it."""
    from anymixer.data import load_tokenizer

    for folder in (file.parent / "tokenizer", file.parent, *([file] if file.is_dir() else [])):
        if any((folder / name).is_file() for name in _TOKENIZER_FILES):
            return load_tokenizer(str(folder))
    return None


def tokenizer_inside(files: Mapping[str, Any]) -> "PreTrainedTokenizerFast | None":
    """The tokenizer in a Composer checkpoint, from its files there: name -> extension and content.

    Composer's own reader writes to whatever path the checkpoint names, and leaves the files there.
    """
    from anymixer.data import load_tokenizer

    if not files:
        return None
    with tempfile.TemporaryDirectory(prefix="anymixer-") as folder:
        for name, saved in files.items():
            suffix, content = saved["file_extension"], saved["content"]
            path = Path(folder) / f"{Path(name).name.removesuffix(suffix)}{suffix}"
            if suffix in (".json", ".txt"):
                path.write_text(json.dumps(content) if suffix == ".json" else "\n".join(content), encoding="utf-8")
        return load_tokenizer(folder)


def _saved_by_composer(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """The model's configuration and tokenizer as Composer's HuggingFaceModel keeps them; empty where it was none."""
    state = content.get("state")
    integrations = state.get("integrations") if isinstance(state, Mapping) else None
    return (integrations or {}).get("huggingface") or {}


def _config_beside(file: Path, key: str) -> Mapping[str, Any] | None:
    beside = file.with_name("config.json")
    return _json(beside, key) if beside.is_file() else None


def read_config(path: Path, key: str) -> Mapping[str, Any]:
    """A model's configuration from a JSON file. Raises UserError naming `key` where there is none."""
    if not path.is_file():
        raise UserError(f"{key}: no such file: {path}")
    return _json(path, key)


def _json(path: Path, key: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{key}: {path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{key}: {path} holds no names and values")
    return content
