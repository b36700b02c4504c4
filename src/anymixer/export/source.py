"""Finds and reads what is to be exported or inspected: a run's folder, a checkpoint of any kind, or a URL of one."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from anymixer.checkpoints.files import read_safetensors, tokenizer_inside
from anymixer.errors import UserError
from anymixer.export.heads import config_class
from anymixer.models.checkpoint_weights import model_weights, read_checkpoint

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

CONFIG_NAME = "config.yaml"
TOKENIZER_NAME = "tokenizer"
HF_CONFIG = "config.json"
# The folder in which a GLUE job leaves its weights.
JOB_CHECKPOINT = "checkpoint"


@dataclass
class Checkpoint:
    """A checkpoint with what lies in it and beside it.

    name: as it was asked for. folder: where the run saved, if it is on this machine. weights: by the model's own
    names. config: of the model. run: the resolved configuration of the run that wrote it, empty where it is unknown;
    made_with: see `RunConfig`. state: what Composer keeps besides the weights. downloaded: a folder that is to go with
    this object.
    """

    name: str
    file: Path
    folder: Path
    weights: dict[str, Tensor]
    config: "PretrainedConfig"
    tokenizer: "PreTrainedTokenizerFast | None" = None
    run: dict[str, Any] = field(default_factory=dict)
    made_with: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    downloaded: "tempfile.TemporaryDirectory[str] | None" = None

    def step(self) -> int | None:
        """Training steps done, where the checkpoint says so."""
        timestamp = self.state.get("timestamp", {}).get("Timestamp", {})
        return timestamp.get("batch")


def open_checkpoint(text: str) -> Checkpoint:
    """Read the checkpoint that `text` names. Raises UserError when there is none, or it is broken or not a model's.

    text: the folder of a run or of a GLUE job (its newest whole checkpoint is taken), a `.pt` file, a folder of
    shards, or a URL of one of these.
    """
    if "://" in text:
        from anymixer.export.download import download

        temporary = tempfile.TemporaryDirectory(prefix="anymixer-")
        checkpoint = _read(download(text, Path(temporary.name)), text)
        checkpoint.downloaded = temporary
        return checkpoint
    return _read(find_checkpoint(Path(text).expanduser()), text)


def find_checkpoint(path: Path) -> Path:
    """The `.pt` file, folder of shards or Hugging Face folder that a path means: itself, what a GLUE job left in it,
    or the newest whole checkpoint of a run."""
    if path.is_file() or _is_checkpoint_folder(path):
        return path
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder; give a run's save_folder or a checkpoint")
    if _is_checkpoint_folder(path / JOB_CHECKPOINT):
        return path / JOB_CHECKPOINT
    from anymixer.training.checkpoints import LATEST, is_whole, list_checkpoints

    for candidate in [*reversed(list_checkpoints(path)), path / LATEST]:
        if candidate.exists() and is_whole(candidate):
            return candidate
    raise UserError(f"{path}: no whole checkpoint is there; give a run's save_folder or a checkpoint")


def _is_checkpoint_folder(path: Path) -> bool:
    return (path / ".metadata").is_file() or ((path / HF_CONFIG).is_file() and any(path.glob("*.safetensors")))


def _read(file: Path, name: str) -> Checkpoint:
    if (file / HF_CONFIG).is_file():
        return _read_hugging_face(file, name)
    content = read_checkpoint(file, "CHECKPOINT" if name == str(file) else name)
    state = content.get("state", {})
    if not isinstance(state, Mapping):
        state = {}
    folder = file.parent
    run, made_with = _run(state)
    config = _model_config(state, folder, name)
    weights = model_weights(content, name)
    inside = state.get("integrations", {}).get("huggingface", {}).get("tokenizer") or {}
    tokenizer = _tokenizer_of(folder / TOKENIZER_NAME) or tokenizer_inside(inside)
    rest = {key: value for key, value in state.items() if key not in ("model", "optimizers")}
    return Checkpoint(name, file, folder, weights, config, tokenizer, run, made_with, rest)


def _read_hugging_face(folder: Path, name: str) -> Checkpoint:
    """A folder that `save_pretrained` wrote: of a GLUE job, or of an earlier export."""
    kept = json.loads((folder / HF_CONFIG).read_text(encoding="utf-8"))
    weights, _ = read_safetensors(tuple(sorted(folder.glob("*.safetensors"))), name)
    return Checkpoint(name, folder, folder.parent, weights, _typed(kept, name), _tokenizer_of(folder))


def _run(state: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The run's resolved configuration, and what it was made with."""
    text = state.get("callbacks", {}).get("RunConfig", {}).get("config")
    kept = json.loads(text) if text else {}
    return kept, kept.pop("made_with", {})


def _model_config(state: Mapping[str, Any], folder: Path, name: str) -> "PretrainedConfig":
    """The model's configuration: what the checkpoint holds, with a user's mixers as config.yaml names their files."""
    kept = state.get("integrations", {}).get("huggingface", {}).get("model", {}).get("config", {}).get("content")
    beside = folder / CONFIG_NAME
    if kept is None:
        if not beside.is_file():
            raise UserError(f"{name}: it does not say what model it is of, and there is no {CONFIG_NAME} beside it")
        from anymixer.config import load_config

        return load_config(beside).model.hugging_face_config()
    config = _typed(kept, name)
    if beside.is_file() and hasattr(config, "mixer"):
        from anymixer.config import load_config

        mixer = load_config(beside).model.mixer
        config.mixer = config.mixer if mixer is None else mixer
    return config


def _typed(kept: Mapping[str, Any], name: str) -> "PretrainedConfig":
    cls = config_class(str(kept.get("model_type")))
    if cls is None:
        raise UserError(f"{name}: a checkpoint of a '{kept.get('model_type')}', which no run of ours trains")
    config = cls.from_dict(dict(kept))
    config.auto_map = None  # of an earlier export
    return config


def _tokenizer_of(folder: Path) -> "PreTrainedTokenizerFast | None":
    from anymixer.data import load_tokenizer

    return load_tokenizer(str(folder)) if (folder / "tokenizer.json").is_file() else None
