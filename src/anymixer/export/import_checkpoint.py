"""`anymixer import SOURCE OUT`: other projects' checkpoints as ours, in a folder like a run's.

The folder holds `latest-rank0.pt`, `config.yaml` and `tokenizer/`, and is there only when everything fitted.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anymixer.checkpoints.files import StoredWeights, open_weights, read_config
from anymixer.checkpoints.kinds import KINDS, Kind, kind_of
from anymixer.errors import UserError
from anymixer.export.new_folder import new_folder
from anymixer.models.checkpoint_weights import misfits

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

    from anymixer.config import PretrainConfig

KEY = "SOURCE"
# Largest difference of a logit between an original and what was imported from it, in float32.
TOLERANCE = 1e-4
CHECKPOINT, CONFIG, TOKENIZER = "latest-rank0.pt", "config.yaml", "tokenizer"
# Of other heads than the masked-LM head: left out, and said so.
_OTHER_HEADS = re.compile(r"(bert\.)?pooler\..*|cls\.seq_relationship\..*")
_TEXTS = ("The cat sat on the mat, and then it went to sleep.", "Paris is the capital of France.")


def import_checkpoint(
    source: str, out: Path, *, config_file: Path | None = None, tokenizer_name: str | None = None
) -> list[str]:
    """Write `source` (see `open_weights`) as a run's folder to `out`; returns what was done, line by line.

    config_file: the model's config.json, where none lies beside the weights. tokenizer_name: folder, file or name of
    the tokenizer, where none does. Raises UserError, and leaves nothing behind, when `out` is there already, something
    cannot be read or would run code, parameters are missing, unknown or of other shapes, the tokenizer has more
    entries than the model, or the logits are not the original's.
    """
    if out.exists() or out.is_symlink():
        raise UserError(f"OUT: {out} exists; nothing was touched; name another folder")
    checkpoint = open_weights(source, KEY)
    kind = kind_of(checkpoint.weights)
    if kind is None:
        known = ", ".join(kind.title.partition(" ")[2] for kind in KINDS)
        name = next(iter(checkpoint.weights))
        raise UserError(
            f"{KEY}: {checkpoint.name} is no model that can be imported ({known}): it has parameters like {name}"
        )
    published = read_config(config_file, "--config") if config_file is not None else checkpoint.config
    config, told = _config(checkpoint, kind, published)
    model, left = _model(checkpoint, kind, config)
    tokenizer = _tokenizer(checkpoint, tokenizer_name, config.vocab_size)
    verdict = _verify(checkpoint, kind, told, model, tokenizer)
    with new_folder(out) as folder:
        _write(folder, out, model, tokenizer)
    lines = [f"{source}: {kind.title}, {sum(p.numel() for p in model.parameters()):,} parameters", verdict]
    if left:
        lines.append(f"left out, because a masked-LM has no such head: {', '.join(left)}")
    if tokenizer is None:
        lines.append("no tokenizer lies beside it; name one (--tokenizer) to give it text or to fine-tune it")
    return [*lines, f"written to {out}"]


def _config(
    checkpoint: StoredWeights, kind: Kind, published: Mapping[str, Any] | None
) -> tuple[Any, Mapping[str, Any]]:
    """The configuration as ours, and as published."""
    module = kind.load()
    if published is None and not hasattr(module, "infer_config"):
        raise UserError(f"{KEY}: {checkpoint.name}: no config.json lies beside it; name it with --config FILE")
    try:
        told: Mapping[str, Any] = module.infer_config(checkpoint.weights) if published is None else published
        config = module.convert_config(told)
    except KeyError as error:
        raise UserError(f"{KEY}: {checkpoint.name} ({kind.title}): its configuration has no {error}") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{KEY}: {checkpoint.name} ({kind.title}): {error}") from error
    if own := [spec["module"] for spec in config.layer_mixers() if isinstance(spec, Mapping) and "module" in spec]:
        raise UserError(
            f"{KEY}: {checkpoint.name}: its mixer would run the code in {own[0]}; nothing of it is run here"
        )
    return config, told


def _model_class(config: "PretrainedConfig") -> Any:
    """Our class with the language model's head."""
    from anymixer.models.modeling_mixer_bert import MixerBertForMaskedLM
    from anymixer.models.modeling_mixer_lm import MixerLMForCausalLM

    return {cls.config_class.model_type: cls for cls in (MixerBertForMaskedLM, MixerLMForCausalLM)}[config.model_type]


def _model(checkpoint: StoredWeights, kind: Kind, config: "PretrainedConfig") -> tuple["PreTrainedModel", list[str]]:
    """The model with the imported weights, in evaluation mode, and what of them was left out."""
    cls = _model_class(config)
    try:
        weights = kind.load().convert_weights(checkpoint.weights)
    except KeyError as error:  # UnknownNames
        raise UserError(f"{KEY}: {checkpoint.name} ({kind.title}): {error.args[0]}") from error
    left = sorted(name for name in checkpoint.weights if _OTHER_HEADS.fullmatch(name))
    weights = {name: value for name, value in weights.items() if not _OTHER_HEADS.fullmatch(name)}
    # Files leave out one of two names of a matrix.
    tied = cls._tied_weights_keys if config.tie_word_embeddings else {}
    weights |= {name: weights[other] for name, other in tied.items() if name not in weights and other in weights}
    with torch.device("meta"):
        own = cls(config).state_dict()
    if problems := misfits(own, weights):
        raise UserError(f"{KEY}: {checkpoint.name} ({kind.title}) does not fit its configuration: {problems}")
    if any(not torch.equal(weights[name], weights[other]) for name, other in tied.items()):
        raise UserError(
            f"{KEY}: {checkpoint.name} ({kind.title}): decoder and word embeddings differ; ours are one matrix"
        )
    model = cls(config)
    model.load_state_dict(weights)
    return model.float().eval(), left


def _tokenizer(checkpoint: StoredWeights, named: str | None, vocab_size: int) -> "PreTrainedTokenizerFast | None":
    from anymixer.data import load_tokenizer

    tokenizer = checkpoint.tokenizer if named is None else load_tokenizer(named)
    if tokenizer is not None and len(tokenizer) > vocab_size:
        raise UserError(
            f"--tokenizer: {named or checkpoint.name} has {len(tokenizer)} entries, the model {vocab_size}; "
            "it is another model's tokenizer"
        )
    return tokenizer


def _verify(
    checkpoint: StoredWeights,
    kind: Kind,
    published: Mapping[str, Any],
    model: Any,
    tokenizer: "PreTrainedTokenizerFast | None",
) -> str:
    """Compare the logits with the original's, where they can be had; what came of it, in one line."""
    if checkpoint.example.keys() == {"input_ids", "logits"}:
        ids, expected = checkpoint.example["input_ids"], checkpoint.example["logits"]
        what, mask = "recorded in the file", torch.ones_like(ids)
    else:
        ids, mask = _sample_rows(tokenizer, model.config)
        expected, what = _original_logits(checkpoint, kind, published, ids, mask)
        if expected is None:
            return f"logits not compared: this transformers has no code for {kind.title}, and the file records none"
    with torch.no_grad():
        own = model(input_ids=ids, attention_mask=mask).logits
    if own.shape != expected.shape:
        raise UserError(f"{KEY}: {checkpoint.name}: logits of shape {list(expected.shape)}, ours {list(own.shape)}")
    difference = float((own - expected)[mask.bool()].abs().max())
    if not difference <= TOLERANCE:  # NaN is no agreement
        raise UserError(
            f"{KEY}: {checkpoint.name} ({kind.title}): logits differ from those {what} by {difference:.2g}, "
            f"more than {TOLERANCE:g}; it is not the model that its configuration says"
        )
    return f"logits agree with those {what}: largest difference {difference:.1e}"


def _original_logits(
    checkpoint: StoredWeights, kind: Kind, published: Mapping[str, Any], ids: Tensor, mask: Tensor
) -> tuple[Tensor | None, str]:
    """The logits of the original's code, None where transformers lacks it; and whose they are."""
    module = kind.load()
    if not hasattr(module, "original_logits"):
        return None, ""
    try:
        return module.original_logits(published, checkpoint.weights, ids, mask), f"of {module.ORIGINAL}"
    except ValueError as error:
        raise UserError(f"{KEY}: {checkpoint.name} ({kind.title}): {error}") from error


def _sample_rows(tokenizer: "PreTrainedTokenizerFast | None", config: Any) -> tuple[Tensor, Tensor]:
    """Two rows of different lengths, of text where there is a tokenizer: ids and mask, [2, length]."""
    # Where `dma` has to choose among equal keys, it does not choose as the original does.
    kept = config.mixer.get("keep_window_size") if isinstance(config.mixer, Mapping) else None
    longest = min(config.max_position_embeddings, kept or 24)
    if tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        rows = [torch.randint(config.vocab_size, (n,), generator=generator).tolist() for n in (24, 9)]
    else:
        rows = [tokenizer.encode(text) for text in _TEXTS]
    rows = [row[:longest] for row in rows]
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])


def _write(folder: Path, out: Path, model: Any, tokenizer: "PreTrainedTokenizerFast | None") -> None:
    """What a run leaves in its save_folder, with the paths that it will have in `out`."""
    from anymixer.config import dump_config

    content = model.config.to_dict()
    saved = {
        "config": {
            "file_extension": ".json",
            "content": content,
            "class": f"{type(model).__module__}.{type(model).__name__}",
        }
    }
    state = {
        "model": {f"model.{name}": value for name, value in model.state_dict().items()},
        "algorithms": [],
        "integrations": {"huggingface": {"model": saved, "tokenizer": {}}},
    }
    with open(folder / CHECKPOINT, "wb") as file:  # by its path, torch does not say when the disk is full
        torch.save({"state": state, "rng": []}, file)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder / TOKENIZER))
    config = _run_config(out.resolve(), model.config)
    (folder / CONFIG).write_text(dump_config(config), encoding="utf-8")


def _run_config(out: Path, config: "PretrainedConfig") -> "PretrainConfig":
    """A run's configuration that continues from the checkpoint in `out`."""
    import inspect

    from anymixer.config import PretrainConfig
    from anymixer.models import ModelConfig

    content = config.to_dict()
    causal = config.model_type == "mixer_lm"
    own = set(inspect.signature(type(config)).parameters) - {"mixer", "kwargs"}
    model = ModelConfig(
        name="causal_lm" if causal else "mixer_bert",
        mixer=content["mixer"],
        model_config={key: content[key] for key in sorted(own)},
        pretrained_checkpoint=str(out / CHECKPOINT),
    )
    run = PretrainConfig(run_name=out.name, tokenizer_name=str(out / TOKENIZER), model=model)
    if causal:
        for place in (run, run.train_loader.dataset, run.eval_loader.dataset):
            place.masking = "causal_lm"
    return run
