"""Other projects' checkpoints as ours: `anymixer import SOURCE OUT` leaves a folder like a run's.

The folder holds `latest-rank0.pt`, `config.yaml` and `tokenizer/`, and is there only when everything fitted.
"""

import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from anymixer.errors import UserError
from anymixer.export import from_hf_bert, mosaic_bert, published_hydra
from anymixer.export.foreign import ForeignCheckpoint, open_foreign, read_config
from anymixer.models.checkpoint_weights import misfits

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerFast

    from anymixer.models.configuration_mixer_bert import MixerBertConfig
    from anymixer.models.modeling_mixer_bert import MixerBertForMaskedLM

KEY = "SOURCE"
# Largest difference of a logit between an original and what was imported from it, in float32.
TOLERANCE = 1e-4
CHECKPOINT, CONFIG, TOKENIZER = "latest-rank0.pt", "config.yaml", "tokenizer"
# Of other heads than the masked-LM head: left out, and said so.
_OTHER_HEADS = re.compile(r"(bert\.)?pooler\..*|cls\.seq_relationship\..*")
_TEXTS = ("The cat sat on the mat, and then it went to sleep.", "Paris is the capital of France.")


@dataclass(frozen=True)
class Kind:
    """A project whose checkpoints are read.

    mark: what one of its parameters is called. infer_config: its configuration from the weights alone, if that can be
    told; names_of: the weights by the names that `convert_weights` reads.
    """

    title: str
    mark: str
    convert_weights: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
    convert_config: Callable[[Mapping[str, Any]], "MixerBertConfig"]
    infer_config: Callable[[Mapping[str, Tensor]], Mapping[str, Any]] | None = None


def _own_config(config: Mapping[str, Any]) -> "MixerBertConfig":
    from anymixer.models.configuration_mixer_bert import MixerBertConfig

    if config.get("model_type") != MixerBertConfig.model_type:
        raise ValueError(f"its configuration is of model_type {config.get('model_type')}, not mixer_bert")
    made = MixerBertConfig(**{key: value for key, value in config.items() if key != "model_type"})
    made.auto_map = None  # of an export
    return made


def _own_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Ours by our names; the tied decoder matrix is filled in where the file leaves it out."""
    filled = dict(weights)
    if "head.dense.weight" in filled and "bert.embeddings.word.weight" in filled:
        filled.setdefault("head.decoder.weight", filled["bert.embeddings.word.weight"])
    return filled


KINDS = (
    Kind(
        "a published Hydra",
        r".*encoder\.layer\.\d+\.layer\.mixer\..*",
        published_hydra.convert_weights,
        published_hydra.convert_config,
        published_hydra.infer_config,
    ),
    Kind(
        "a MosaicBERT",
        r".*attention\.self\.Wqkv\..*",
        mosaic_bert.convert_weights,
        mosaic_bert.convert_config,
    ),
    Kind(
        "a Hugging Face BERT",
        r".*attention\.self\.query\..*",
        from_hf_bert.convert_weights,
        from_hf_bert.convert_config,
    ),
    Kind("a model of ours", r".*backbone\.layers\.\d+\..*", _own_weights, _own_config),
)


def import_checkpoint(
    source: str, out: Path, *, config_file: Path | None = None, tokenizer_name: str | None = None
) -> list[str]:
    """Write `source` (see `open_foreign`) as a run's folder to `out`; returns what was done, line by line.

    config_file: the model's config.json, where none lies beside the weights. tokenizer_name: folder, file or name of
    the tokenizer, where none does. Raises UserError, and leaves nothing behind, when `out` is there already, something
    cannot be read or would run code, parameters are missing, unknown or of other shapes, the tokenizer has more
    entries than the model, or the logits are not the original's.
    """
    if out.exists() or out.is_symlink():
        raise UserError(f"OUT: {out} exists; nothing was touched; name another folder")
    checkpoint = open_foreign(source, KEY)
    kind = _kind(checkpoint)
    published = read_config(config_file, "--config") if config_file is not None else checkpoint.config
    config, told = _config(checkpoint, kind, published)
    model, left = _model(checkpoint, kind, config)
    tokenizer = _tokenizer(checkpoint, tokenizer_name, config.vocab_size)
    verdict = _verify(checkpoint, kind, told, model, tokenizer)
    with _appearing(out) as folder:
        _write(folder, out, model, tokenizer)
    lines = [f"{source}: {kind.title}, {sum(p.numel() for p in model.parameters()):,} parameters", verdict]
    if left:
        lines.append(f"left out, because a masked-LM has no such head: {', '.join(left)}")
    if tokenizer is None:
        lines.append("no tokenizer lies beside it; name one (--tokenizer) to fill masks with it or to fine-tune it")
    return [*lines, f"written to {out}"]


def _kind(checkpoint: ForeignCheckpoint) -> Kind:
    for kind in KINDS:
        if any(re.fullmatch(kind.mark, name) for name in checkpoint.weights):
            return kind
    known = ", ".join(kind.title.partition(" ")[2] for kind in KINDS)
    name = next(iter(checkpoint.weights))
    raise UserError(
        f"{KEY}: {checkpoint.name} is no model that can be imported ({known}): it has parameters like {name}"
    )


def _config(
    checkpoint: ForeignCheckpoint, kind: Kind, published: Mapping[str, Any] | None
) -> tuple["MixerBertConfig", Mapping[str, Any]]:
    """The configuration as ours, and as published."""
    try:
        if published is None:
            if kind.infer_config is None:
                raise UserError(f"{KEY}: {checkpoint.name}: no config.json lies beside it; name it with --config FILE")
            published = kind.infer_config(checkpoint.weights)
        return kind.convert_config(published), published
    except KeyError as error:
        raise UserError(f"{KEY}: {checkpoint.name} ({kind.title}): its configuration has no {error}") from error
    except (ValueError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{KEY}: {checkpoint.name} ({kind.title}): {error}") from error


def _model(
    checkpoint: ForeignCheckpoint, kind: Kind, config: "MixerBertConfig"
) -> tuple["MixerBertForMaskedLM", list[str]]:
    """The model with the imported weights, in evaluation mode, and what of them was left out."""
    from anymixer.models.modeling_mixer_bert import MixerBertForMaskedLM

    try:
        weights = kind.convert_weights(checkpoint.weights)
    except KeyError as error:  # UnknownNames
        raise UserError(f"{KEY}: {checkpoint.name} ({kind.title}): {error.args[0]}") from error
    left = sorted(name for name in checkpoint.weights if _OTHER_HEADS.fullmatch(name))
    weights = {name: value for name, value in weights.items() if not _OTHER_HEADS.fullmatch(name)}
    with torch.device("meta"):
        own = MixerBertForMaskedLM(config).state_dict()
    if problems := misfits(own, weights):
        raise UserError(f"{KEY}: {checkpoint.name} ({kind.title}) does not fit its configuration: {problems}")
    if not torch.equal(weights["head.decoder.weight"], weights["bert.embeddings.word.weight"]):
        raise UserError(
            f"{KEY}: {checkpoint.name} ({kind.title}): decoder and word embeddings differ; ours are one matrix"
        )
    model = MixerBertForMaskedLM(config)
    model.load_state_dict(weights)
    return model.float().eval(), left


def _tokenizer(checkpoint: ForeignCheckpoint, named: str | None, vocab_size: int) -> "PreTrainedTokenizerFast | None":
    from anymixer.data import load_tokenizer

    tokenizer = checkpoint.tokenizer if named is None else load_tokenizer(named)
    if tokenizer is not None and len(tokenizer) > vocab_size:
        raise UserError(
            f"--tokenizer: {named or checkpoint.name} has {len(tokenizer)} entries, the model {vocab_size}; "
            "it is another model's tokenizer"
        )
    return tokenizer


def _verify(
    checkpoint: ForeignCheckpoint,
    kind: Kind,
    published: Mapping[str, Any],
    model: "MixerBertForMaskedLM",
    tokenizer: "PreTrainedTokenizerFast | None",
) -> str:
    """Compare the logits with the original's, where they can be had; what came of it, in one line."""
    if checkpoint.example.keys() == {"input_ids", "logits"}:
        ids, expected = checkpoint.example["input_ids"], checkpoint.example["logits"]
        what, mask = "recorded in the file", torch.ones_like(ids)
    elif kind.convert_weights is from_hf_bert.convert_weights:
        ids, mask = _sample_rows(tokenizer, model.config.vocab_size, model.config.max_position_embeddings)
        expected, what = _bert_logits(checkpoint, published, ids, mask), "of transformers' BertForMaskedLM"
    else:
        return "logits not compared: the original's code is not in transformers, and the file records none"
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


def _sample_rows(tokenizer: "PreTrainedTokenizerFast | None", vocab_size: int, longest: int) -> tuple[Tensor, Tensor]:
    """Two rows of different lengths, of text where there is a tokenizer: ids and mask, [2, length]."""
    if tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        rows = [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in (min(longest, 24), 9)]
    else:
        rows = [tokenizer.encode(text)[:longest] for text in _TEXTS]
    length = max(map(len, rows))
    ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
    return ids, torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])


@torch.no_grad()
def _bert_logits(checkpoint: ForeignCheckpoint, published: Mapping[str, Any], ids: Tensor, mask: Tensor) -> Tensor:
    """Logits [batch, length, vocab_size] of transformers' own BERT with the checkpoint's weights."""
    from transformers import BertConfig, BertForMaskedLM

    model = BertForMaskedLM(BertConfig.from_dict(dict(published)))
    found = model.load_state_dict(from_hf_bert.standard_names(checkpoint.weights), strict=False)
    # The decoder's matrix and bias have two names each, of which a file may leave one out.
    if missing := [
        name for name in found.missing_keys if not name.startswith(("cls.predictions.decoder.", "cls.predictions.bias"))
    ]:
        raise UserError(f"{KEY}: {checkpoint.name}: {len(missing)} missing ({', '.join(missing[:3])})")
    model.tie_weights()
    return model.eval()(input_ids=ids, attention_mask=mask).logits


@contextmanager
def _appearing(out: Path) -> "Iterator[Path]":
    """A folder beside `out` to write into, which becomes `out` at the end and vanishes on any failure."""
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = out.with_name(f".{out.name}.{os.getpid()}")
    folder.mkdir()
    try:
        yield folder
        if out.exists():
            raise UserError(f"OUT: {out} appeared meanwhile; nothing was touched; name another folder")
        folder.rename(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _write(folder: Path, out: Path, model: "MixerBertForMaskedLM", tokenizer: "PreTrainedTokenizerFast | None") -> None:
    """What a run leaves in its save_folder, with the paths that it will have in `out`."""
    import inspect

    from anymixer.config import PretrainConfig, dump_config
    from anymixer.models import ModelConfig

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
    torch.save({"state": state, "rng": []}, folder / CHECKPOINT)
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder / TOKENIZER))
    own = set(inspect.signature(type(model.config)).parameters) - {"mixer", "kwargs"}
    out = out.resolve()
    run = PretrainConfig(
        run_name=out.name,
        tokenizer_name=str(out / TOKENIZER),
        model=ModelConfig(
            mixer=content["mixer"],
            model_config={key: content[key] for key in sorted(own)},
            pretrained_checkpoint=str(out / CHECKPOINT),
        ),
    )
    (folder / CONFIG).write_text(dump_config(run), encoding="utf-8")
