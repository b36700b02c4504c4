"""Where a fine-tuning job takes its weights and its tokenizer from.

A run's folder, a Composer `.pt` (ours, a published Hydra, a MosaicBERT, a Hugging Face BERT), a Hugging Face folder or
name.
The encoder must be there completely and be the configured one; heads alone are drawn anew, and that is said.
"""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from anymixer.checkpoints.files import StoredWeights, files_digest, open_weights, weight_files
from anymixer.checkpoints.kinds import HUGGING_FACE_BERT, kind_of
from anymixer.data import load_tokenizer, tokenizer_fingerprint
from anymixer.errors import UserError
from anymixer.models.checkpoint_weights import misfits

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

KEY = "starting_point"
# What a fine-tuning job may draw anew, and what it leaves in the checkpoint: everything else must fit.
_NEW = re.compile(r"(bert\.)?pooler\..*|classifier\..*")
_LEFT = re.compile(r"(bert\.)?pooler\..*|classifier\..*|head\..*|cls\..*")
# Of a saved configuration: what changes no number of a trained model.
_FREE_KEYS = frozenset({"hidden_dropout_prob", "layer_dropout_prob", "initializer_range", "tie_word_embeddings"})


def open_starting_point(name: str, key: str = KEY) -> StoredWeights:
    """Read a starting point.

    Raises UserError, naming `key`, for what cannot be found or read, or would run code when read.
    """
    return open_weights(name, key)


def checkpoint_digest(name: str, key: str = KEY) -> str:
    """SHA-256 over the files that hold a starting point's weights. Raises UserError, naming `key`, for what cannot be
    found."""
    return files_digest(weight_files(name, key))


def choose_tokenizer(point: StoredWeights | None, tokenizer_name: str | None) -> "PreTrainedTokenizerFast":
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


def take_weights(model: "PreTrainedModel", point: StoredWeights) -> str:
    """Fill a classifier's encoder, and its pooler where there is one, from a starting point.

    Returns what was taken and what stays as it was drawn, in words. The classifier itself is never taken.
    Raises UserError, naming the keys and saying why, unless the whole encoder fits.
    """
    kind = _title(point.weights)
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


def _title(weights: Mapping[str, Tensor]) -> str:
    """Whose names these are, in words."""
    kind = kind_of(weights)
    return "unknown names" if kind is None else kind.title


def _under_names_of(model: "PreTrainedModel", point: StoredWeights) -> dict[str, Tensor]:
    """The weights under the names that the model's kind has."""
    kind = kind_of(point.weights)
    if kind is None:
        return dict(point.weights)
    if model.config.model_type != "mixer_bert":
        return kind.load().standard_names(point.weights) if kind is HUGGING_FACE_BERT else dict(point.weights)
    try:
        return kind.load().convert_weights(point.weights)
    except KeyError as error:
        raise UserError(f"{KEY}: {point.name}: {error.args[0]!s}") from error


def _check_config(model: "PreTrainedModel", point: StoredWeights) -> None:
    """Raise UserError for a saved configuration that computes something else with the same shapes of weights."""
    if point.config is None:
        return
    kind, saved = kind_of(point.weights), point.config
    if model.config.model_type == "mixer_bert" and kind is not None:
        try:
            saved = kind.load().convert_config(point.config).to_dict()
        except ValueError as error:
            raise UserError(f"{KEY}: {point.name}: {error}") from error
    if wrong := _differences(_identity(saved), _identity(model.config.to_dict())):
        title = _title(point.weights)
        raise UserError(f"{KEY}: {point.name} ({title}) is not the configured model: {'; '.join(wrong[:4])}")


def _identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a configuration decides what the encoder computes, with the mixers' defaults filled in."""
    from anymixer.layers.channel_mixers import channel_mixers
    from anymixer.mixers import parse_mixer
    from anymixer.models.backbone import cycled
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
    del identity["channel_mixer"]
    for layer, channel_mixer in enumerate(cycled(full.channel_mixer, full.num_hidden_layers)):
        if channel_mixer is not None:
            cls, options = channel_mixers.parse(channel_mixer, "channel_mixer")
            identity |= {f"channel_mixer of layer {layer}": cls.__name__}
            identity |= {f"channel_mixer of layer {layer}, {key}": value for key, value in vars(options).items()}
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
