"""Where a fine-tuning job takes its weights and its tokenizer from.

A run's folder, a Composer `.pt` (ours, a published Hydra, a MosaicBERT, a Hugging Face BERT), a Hugging Face folder or
name.
The encoder must be there completely and be the configured one; heads alone are drawn anew, and that is said.
"""

import hashlib
import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from anymixer.data import load_tokenizer, tokenizer_fingerprint
from anymixer.errors import UserError
from anymixer.models.checkpoint_weights import misfits, model_weights, read_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

KEY = "starting_point"
_LATEST = "latest-rank0.pt"
# In a folder of shards, which is one checkpoint.
_SHARDS = ".metadata"
_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
_TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", "vocab.json")
_HUGGING_FACE = "a Hugging Face BERT"
# Whose checkpoint it is, a name that only such a one has, and the module that knows it.
_KINDS = (
    (_HUGGING_FACE, r".*\.attention\.self\.query\..*", "anymixer.export.from_hf_bert"),
    ("a published Hydra", r"bert\.encoder\.layer\.\d+\.layer\.mixer\..*", "anymixer.export.published_hydra"),
    ("a MosaicBERT", r".*\.attention\.self\.Wqkv\..*", "anymixer.export.mosaic_bert"),
    ("a model of ours", r"bert\.backbone\..*", None),
)
# What a fine-tuning job may draw anew, and what it leaves in the checkpoint: everything else must fit.
_NEW = re.compile(r"(bert\.)?pooler\..*|classifier\..*")
_LEFT = re.compile(r"(bert\.)?pooler\..*|classifier\..*|head\..*|cls\..*")
# Of a saved configuration: what changes no number of a trained model.
_FREE_KEYS = frozenset({"hidden_dropout_prob", "layer_dropout_prob", "initializer_range", "tie_word_embeddings"})


@dataclass(frozen=True)
class StartingPoint:
    """Weights read from a checkpoint, under the names they have there.

    name: as the user wrote it. files: that hold the weights. config: the model's configuration as saved beside them,
    tokenizer: theirs; None where there is none.
    """

    name: str
    files: tuple[Path, ...]
    weights: Mapping[str, Tensor]
    config: Mapping[str, Any] | None
    tokenizer: "PreTrainedTokenizerFast | None"

    @property
    def digest(self) -> str:
        """SHA-256 over the weights' files."""
        return _digest(self.files)


def open_starting_point(name: str) -> StartingPoint:
    """Read a starting point.

    Raises UserError for what cannot be found or read, or would run code when read.
    """
    files = _weight_files(name)
    weights: dict[str, Tensor] = {}
    saved: Mapping[str, Any] = {}
    for file in files:
        if file.suffix == ".safetensors":
            weights |= _read_safetensors(file)
        else:
            checkpoint = read_checkpoint(file, KEY)
            weights |= model_weights(checkpoint, KEY)
            saved = _saved_by_composer(checkpoint)
    config = ((saved.get("model") or {}).get("config") or {}).get("content")
    if config is None and (file := files[0].with_name("config.json")).is_file():
        config = json.loads(file.read_text(encoding="utf-8"))
    tokenizer = _tokenizer_of(saved.get("tokenizer") or {}) or _tokenizer_beside(files[0])
    return StartingPoint(name, files, weights, config, tokenizer)


def checkpoint_digest(name: str) -> str:
    """SHA-256 over the files that hold a starting point's weights. Raises UserError for what cannot be found."""
    return _digest(_weight_files(name))


def choose_tokenizer(point: StartingPoint | None, tokenizer_name: str | None) -> "PreTrainedTokenizerFast":
    """The checkpoint's own tokenizer; `tokenizer_name`'s where it has none.

    Raises UserError where the two differ: the words would no longer be those that the weights were trained on.
    """
    own = point.tokenizer if point is not None else None
    if tokenizer_name is None:
        if own is None:
            where = f"{point.name} holds none" if point is not None else "from_scratch has none of its own"
            raise UserError(f"tokenizer_name: not set, and {where}; name the tokenizer")
        return own
    named = load_tokenizer(tokenizer_name)
    if own is not None and point is not None and tokenizer_fingerprint(own) != tokenizer_fingerprint(named):
        raise UserError(
            f"tokenizer_name: {tokenizer_name} is not the tokenizer of {point.name} "
            f"({len(named)} entries against {len(own)}, or others); remove the key to use the checkpoint's own"
        )
    return own or named


def take_weights(model: "PreTrainedModel", point: StartingPoint) -> str:
    """Fill a classifier's encoder, and its pooler where there is one, from a starting point.

    Returns what was taken and what stays as it was drawn, in words. The classifier itself is never taken.
    Raises UserError, naming the keys and saying why, unless the whole encoder fits.
    """
    kind, _ = _kind(point.weights)
    weights = _under_names_of(model, point)
    _check_config(model, point)
    own = model.state_dict()
    taken = {name: value for name, value in weights.items() if not _LEFT.fullmatch(name)}
    body = {name: value for name, value in own.items() if not _NEW.fullmatch(name)}
    if problems := misfits(body, taken):
        raise UserError(f"{KEY}: {point.name} ({kind}) does not fit the model: {problems}")
    for name, value in weights.items():
        if _NEW.fullmatch(name) and "pooler." in name and name in own and own[name].shape == value.shape:
            taken[name] = value
    model.load_state_dict(taken, strict=False)
    new, left = sorted(own.keys() - taken.keys()), sorted(weights.keys() - taken.keys())
    return f"{len(taken)} tensors from {point.name} ({kind}); drawn anew: {_listed(new)}; not used: {_listed(left)}"


def _listed(names: list[str]) -> str:
    return ", ".join(dict.fromkeys(name.rpartition(".")[0] for name in names)) or "nothing"


def _kind(weights: Mapping[str, Tensor]) -> tuple[str, Any]:
    """Whose names these are, in words, and the module that turns them into ours (None for ours and unknown ones)."""
    for kind, pattern, module in _KINDS:
        if any(re.fullmatch(pattern, name) for name in weights):
            return kind, import_module(module) if module else None
    return "unknown names", None


def _under_names_of(model: "PreTrainedModel", point: StartingPoint) -> dict[str, Tensor]:
    """The weights under the names that the model's kind has."""
    kind, module = _kind(point.weights)
    if model.config.model_type != "mixer_bert":
        return module.standard_names(point.weights) if kind == _HUGGING_FACE else dict(point.weights)
    try:
        return dict(point.weights) if module is None else module.convert_weights(point.weights)
    except KeyError as error:
        raise UserError(f"{KEY}: {point.name}: {error.args[0]!s}") from error


def _check_config(model: "PreTrainedModel", point: StartingPoint) -> None:
    """Raise UserError for a saved configuration that computes something else with the same shapes of weights."""
    if point.config is None:
        return
    kind, module = _kind(point.weights)
    saved = point.config
    if model.config.model_type == "mixer_bert" and module is not None:
        try:
            saved = module.convert_config(point.config).to_dict()
        except ValueError as error:
            raise UserError(f"{KEY}: {point.name}: {error}") from error
    if wrong := _differences(_identity(saved), _identity(model.config.to_dict())):
        raise UserError(f"{KEY}: {point.name} ({kind}) is not the configured model: {'; '.join(wrong[:4])}")


def _identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a configuration decides what the encoder computes, with the mixers' defaults filled in."""
    from anymixer.layers.channel_mixers import channel_mixers
    from anymixer.mixers import parse_mixer
    from anymixer.models.configuration_mixer_bert import MixerBertConfig

    if config.get("model_type") != "mixer_bert":
        keys = ("model_type", "num_attention_heads", "hidden_act", "layer_norm_eps", "position_embedding_type")
        return {key: config[key] for key in keys if key in config}
    full = MixerBertConfig(**{key: value for key, value in config.items() if key != "model_type"})
    known = MixerBertConfig().to_dict().keys() & vars(full).keys()
    identity = {key: getattr(full, key) for key in known & _own_keys() - _FREE_KEYS}
    for layer, mixer in enumerate(full.layer_mixers()):
        cls, options = parse_mixer(mixer, full.hidden_size)
        chosen = {key: value for key, value in vars(options).items() if key != "dropout"}
        identity |= {f"mixer of layer {layer}": cls.__name__}
        identity |= {f"mixer of layer {layer}, {key}": value for key, value in chosen.items()}
    if full.channel_mixer is not None:
        cls, options = channel_mixers.parse(full.channel_mixer, "channel_mixer")
        identity |= {f"channel_mixer.{key}": value for key, value in vars(options).items()}
        identity["channel_mixer"] = cls.__name__
    if full.position_embeddings == "none":
        del identity["max_position_embeddings"]
    return identity


def _own_keys() -> frozenset[str]:
    """The fields that MixerBertConfig declares, less the mixer's."""
    import inspect

    from anymixer.models.configuration_mixer_bert import MixerBertConfig

    return frozenset(inspect.signature(MixerBertConfig).parameters) - {"mixer", "kwargs"}


def _differences(saved: Mapping[str, Any], own: Mapping[str, Any]) -> list[str]:
    return [
        f"{key} is {saved.get(key)} in the checkpoint and {own.get(key)} in the configuration"
        for key in {**own, **saved}
        if saved.get(key) != own.get(key)
    ]


def _weight_files(name: str) -> tuple[Path, ...]:
    path = Path(name).expanduser()
    if path.is_file():
        return (path.resolve(),)
    if path.is_dir():
        return _files_of_folder(path)
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or path.suffix in (".pt", ".bin", ".safetensors"):
        raise UserError(f"{KEY}: no such file or folder: {name}")
    return _files_of_folder(_from_hub(name))


def _files_of_folder(folder: Path) -> tuple[Path, ...]:
    if (folder / _SHARDS).is_file():
        return (folder.resolve(),)
    if (latest := folder / _LATEST).exists():
        return (latest.resolve(),)
    for name in _WEIGHT_FILES:
        if not (file := folder / name).is_file():
            continue
        if file.suffix != ".json":
            return (file,)
        parts = json.loads(file.read_text(encoding="utf-8"))["weight_map"].values()
        return tuple(folder / Path(part).name for part in sorted(set(parts)))
    raise UserError(f"{KEY}: {folder} holds no checkpoint ({_LATEST}, {', '.join(_WEIGHT_FILES)})")


def _from_hub(name: str) -> Path:
    """A snapshot of a model on the Hub, from the local cache where it is there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    patterns = ["*.json", "vocab.txt", "merges.txt", "model*.safetensors"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns, local_files_only=True))
    except (OSError, HFValidationError):
        pass  # not in the cache: ask the Hub
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise UserError(
            f"{KEY}: '{name}' is neither a file nor a folder, and cannot be fetched from the Hugging Face Hub"
        ) from error


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{KEY}: {file} cannot be read: {error}") from error


def _digest(files: tuple[Path, ...]) -> str:
    digest = hashlib.sha256()
    parts = [part for path in files for part in (sorted(path.iterdir()) if path.is_dir() else [path])]
    for path in parts:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def _saved_by_composer(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    """The model's configuration and tokenizer as Composer's HuggingFaceModel keeps them; empty where it was none."""
    state = checkpoint.get("state")
    integrations = state.get("integrations") if isinstance(state, Mapping) else None
    return (integrations or {}).get("huggingface") or {}


def _tokenizer_of(files: Mapping[str, Any]) -> "PreTrainedTokenizerFast | None":
    """The tokenizer in a Composer checkpoint.

    Composer's own reader writes to whatever path the checkpoint names, and leaves the files there.
    """
    if not files:
        return None
    with tempfile.TemporaryDirectory() as folder:
        for name, saved in files.items():
            suffix, content = saved["file_extension"], saved["content"]
            path = Path(folder) / f"{Path(name).name.removesuffix(suffix)}{suffix}"
            if suffix in (".json", ".txt"):
                path.write_text(json.dumps(content) if suffix == ".json" else "\n".join(content), encoding="utf-8")
        return load_tokenizer(folder)


def _tokenizer_beside(file: Path) -> "PreTrainedTokenizerFast | None":
    """The tokenizer in the checkpoint's folder, or in `tokenizer` there, as our runs leave it."""
    for folder in (file.parent / "tokenizer", file.parent):
        if any((folder / name).is_file() for name in _TOKENIZER_FILES):
            return load_tokenizer(str(folder))
    return None
