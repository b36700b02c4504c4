"""Writes a model as a folder that transformers loads without this package."""

import inspect
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from anymixer.errors import UserError
from anymixer.export.flatten import FlatCode, flatten, write_code
from anymixer.export.heads import FAMILIES, model_classes
from anymixer.export.source import Checkpoint
from anymixer.mixers import SequenceMixer
from anymixer.models.checkpoint_weights import misfits

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

MAX_SHARD_SIZE = "5GB"
_TOKENIZER_OUTPUTS = ("input_ids", "token_type_ids", "attention_mask")


@dataclass
class ExportedModel:
    """A model and the name in transformers that loads it, with what its folder will need.

    blocked: packages that the folder must do without. requirements: packages that a user's mixer imports.
    """

    model: "PreTrainedModel"
    auto_class: str
    tokenizer: "PreTrainedTokenizerFast | None"
    code: FlatCode | None
    blocked: list[str] = field(default_factory=list)

    @property
    def requirements(self) -> list[str]:
        """Packages besides torch and transformers that the folder needs."""
        return [] if self.code is None else self.code.requirements


def build_exported(checkpoint: Checkpoint) -> ExportedModel:
    """`build_model`, with what its folder will need."""
    auto_class, model = build_model(checkpoint)
    return exported(model, auto_class, checkpoint.tokenizer)


def build_model(checkpoint: Checkpoint) -> "tuple[str, PreTrainedModel]":
    """The name in transformers of the class that the checkpoint's weights are of, and such a model with them, in
    float32 and evaluation mode.

    Raises UserError, naming what is missing or too much, when they are no model's.
    """
    auto_class, empty = _matching_class(checkpoint)
    model: Any = type(empty)(checkpoint.config)
    model.load_state_dict(checkpoint.weights)
    return auto_class, model.float().eval()


def exported(model: "PreTrainedModel", auto_class: str, tokenizer: "PreTrainedTokenizerFast | None") -> ExportedModel:
    """A model that is there already."""
    family = FAMILIES.get(model.config.model_type)
    if family is None:
        return ExportedModel(model, auto_class, tokenizer, None, ["anymixer", "anymixer_kernels"])
    code = flatten(family, [type(m) for m in model.modules() if isinstance(m, SequenceMixer)])
    return ExportedModel(model, auto_class, tokenizer, code, code.roots)


def build_on_meta(checkpoint: Checkpoint) -> "PreTrainedModel":
    """The checkpoint's model without storage for its parameters; errors as in `build_model`."""
    return _matching_class(checkpoint)[1]


def _matching_class(checkpoint: Checkpoint) -> tuple[str, "PreTrainedModel"]:
    """The name in transformers of the class whose parameters are the checkpoint's, and such a model without storage."""
    import torch
    import transformers.modeling_utils  # noqa: F401  imported on the meta device, it would fail

    closest: tuple[int, str] | None = None
    for auto_class, cls in model_classes(checkpoint.config.model_type).items():
        with torch.device("meta"):
            model = cls(checkpoint.config)
        own = model.state_dict()
        weights = _with_tied(model, checkpoint.weights)
        problems = misfits(own, weights)
        if not problems:
            checkpoint.weights = weights
            return auto_class, model
        apart = len(own.keys() ^ weights.keys())
        if closest is None or apart < closest[0]:
            closest = (apart, f"{cls.__name__}: {problems}")
    assert closest is not None
    raise UserError(f"{checkpoint.name}: its weights do not fit {closest[1]}")


def _with_tied(model: "PreTrainedModel", weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """`weights` under every name that one of them has in `model`: Hugging Face folders hold tied ones once."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    complete = dict(weights)
    for tied in names.values():
        held = [weights[name] for name in tied if name in weights]
        complete |= {name: held[0] for name in tied if held and name not in weights}
    return complete


def longest_row(model: "PreTrainedModel") -> int | None:
    """Most tokens the model takes at once, None without a limit."""
    config = model.config
    limits: list[int | None] = [m.config.longest_row() for m in model.modules() if isinstance(m, SequenceMixer)]  # type: ignore[operator,union-attr]
    if getattr(config, "position_embeddings", "learned") == "learned":
        limits.append(config.max_position_embeddings)
    return min((limit for limit in limits if limit is not None), default=None)


def write_folder(exported: ExportedModel, folder: Path) -> None:
    """Write weights, configuration, tokenizer and code into `folder`."""
    model, tokenizer = exported.model, exported.tokenizer
    family = FAMILIES.get(model.config.model_type)
    if family is not None and exported.code is not None:
        model.config.auto_map = family.auto_map()
        model.config.mixer = _without_modules(model.config.mixer)
        folder.mkdir(parents=True, exist_ok=True)
        write_code(exported.code, folder)
    model.save_pretrained(folder, max_shard_size=MAX_SHARD_SIZE, safe_serialization=True)
    for weights in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", weights)  # safetensors makes files for their owner alone
    if tokenizer is not None:
        limit = longest_row(model)
        tokenizer.model_max_length = limit if limit is not None else tokenizer.model_max_length
        tokenizer.save_pretrained(str(folder))
        _settle_tokenizer(folder / "tokenizer_config.json", model)


def _without_modules(mixer: Any) -> Any:
    """The mixers' specifications less the files that they came from: the folder holds these."""
    if isinstance(mixer, Sequence) and not isinstance(mixer, str):
        return [_without_modules(spec) for spec in mixer]
    return {key: value for key, value in mixer.items() if key != "module"} if isinstance(mixer, Mapping) else mixer


def _settle_tokenizer(file: Path, model: "PreTrainedModel") -> None:
    """Make a saved fast tokenizer give what the model takes, under a class name that every transformers knows: 5
    writes one that is new there."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    taken = inspect.signature(model.forward).parameters
    settings["model_input_names"] = [name for name in _TOKENIZER_OUTPUTS if name in taken]
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
