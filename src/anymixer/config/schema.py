"""The configuration of a pretraining run: the sections declared beside their classes, put together.

The key names are MosaicBERT's. A mixer's, callback's or logger's options are untyped here (`Any`, `dict`)
and checked by their owners, because OmegaConf knows no "a dataclass or a list of them".
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from anymixer.config import legacy
from anymixer.config.base import ConfigSchema
from anymixer.config.layers import lookup
from anymixer.data import LoaderConfig, maskings
from anymixer.errors import UserError
from anymixer.models import ModelConfig
from anymixer.training import TrainerConfig


@dataclass(kw_only=True)
class PretrainConfig(TrainerConfig, ConfigSchema):
    """A masked-language-model pretraining run: the trainer's keys, the model, the data and two loaders.

    Loaders take what they leave unset from here: `dataset.local`, `remote` and `max_seq_len` from
    `data_local`, `data_remote` and `max_seq_len` (the first two not where `dataset.streams` says where the
    data is), and the training loader its `mlm_probability` and `masking`; evaluation masks 15 % by BERT's recipe
    unless it says otherwise, so that runs can be compared.
    A causal_lm is trained and evaluated on every next token unless the file says otherwise.
    A run without `run_name` is called $COMPOSER_RUN_NAME, else as its file.

    tokenizer_name: a folder, a vocab.txt or a Hugging Face name; the one tokenizer of the run.
    max_seq_len: tokens in a row. mlm_probability: share of the tokens that training masks.
    masking: how training masks them: a name of `anymixer.data.maskings`, or a mapping of it and its options.
    eval_first: evaluate once before the first step, so that the report can show before and after.
    """

    REFUSED: ClassVar[Mapping[str, str]] = legacy.REFUSED
    REPLACED_BY_NAME: ClassVar[frozenset[str]] = frozenset(
        {
            "model.mixer",
            "model.model_config.channel_mixer",
            "masking",
            "train_loader.dataset.masking",
            "eval_loader.dataset.masking",
        }
    )
    CLEARABLE: ClassVar[frozenset[str]] = frozenset({"algorithms", "callbacks", "loggers"})

    data_local: str | None = None
    data_remote: str | None = None
    max_seq_len: int = 128
    tokenizer_name: str
    mlm_probability: float = 0.30
    masking: Any = "bert"
    eval_first: bool = False

    model: ModelConfig = field(default_factory=ModelConfig)
    train_loader: LoaderConfig = field(default_factory=LoaderConfig)
    eval_loader: LoaderConfig = field(default_factory=LoaderConfig)

    @classmethod
    def unset_values(cls, layers: Mapping[str, Any], stem: str) -> Mapping[str, Any]:
        """Return the run's name and what the loaders take from the top of the file."""
        train = _by_role(train=True) | {f"dataset.{key}": f"${{{key}}}" for key in ("mlm_probability", "masking")}
        values: dict[str, Any] = {"run_name": os.environ.get("COMPOSER_RUN_NAME") or stem}
        for loader, by_role in (("train_loader", train), ("eval_loader", _by_role(train=False))):
            shared = {"dataset.max_seq_len": "${max_seq_len}"}
            if not lookup(layers, f"{loader}.dataset.streams"):
                shared |= {"dataset.local": "${data_local}", "dataset.remote": "${data_remote}"}
            values |= {f"{loader}.{key}": value for key, value in (by_role | shared).items()}
        if lookup(layers, "model.name") == "causal_lm":
            values |= {"masking": "causal_lm", "eval_loader.dataset.masking": "causal_lm"}
        return values

    def validate(self) -> None:
        """Raise UserError, naming the key, for what no machine could run; looks at no device and no data."""
        super().validate()
        if self.max_seq_len < 1:
            raise UserError(f"max_seq_len: {self.max_seq_len} must be at least 1")
        if not 0 < self.mlm_probability < 1:
            raise UserError(f"mlm_probability: {self.mlm_probability} must lie between 0 and 1, e.g. 0.30")
        maskings.parse(self.masking, "masking")[1].validate("masking", self.mlm_probability)
        self.train_loader.validate("train_loader")
        self.eval_loader.validate("eval_loader")
        self.model.validate()
        self._validate_objective()
        self._validate_one_tokenizer()

    def _validate_objective(self) -> None:
        """A language model predicts next tokens and an encoder hidden ones; the other's loss would mean nothing."""
        causal = self.model.name == "causal_lm"
        for key, masking in (("masking", self.masking), ("eval_loader.dataset.masking", self.eval_masking())):
            if maskings.parse(masking, key)[0].predicts_masks == causal:
                wanted = "causal_lm" if causal else "another"
                raise UserError(f"{key}: {masking!r} does not fit model.name: {self.model.name}; choose {wanted}")

    def eval_masking(self) -> Any:
        """How evaluation masks."""
        return self.eval_loader.resolved(train=False).dataset.masking

    def _validate_one_tokenizer(self) -> None:
        """MosaicBERT names the tokenizer in four places and reads one: they may not disagree."""
        named = {
            "model.tokenizer_name": self.model.tokenizer_name,
            "train_loader.dataset.tokenizer_name": self.train_loader.dataset.tokenizer_name,
            "eval_loader.dataset.tokenizer_name": self.eval_loader.dataset.tokenizer_name,
        }
        for key, name in named.items():
            if name is not None and name != self.tokenizer_name:
                raise UserError(
                    f"{key}: '{name}' is not the tokenizer_name of the run, '{self.tokenizer_name}'; "
                    f"remove the key, or write {key.rpartition('.')[2]}: ${{tokenizer_name}}"
                )


def _by_role(*, train: bool) -> dict[str, Any]:
    """Return key path -> value of what a loader does by default when it trains, or evaluates."""
    loader = LoaderConfig().resolved(train=train)
    dataset = {f"dataset.{key}": getattr(loader.dataset, key) for key in ("split", "shuffle", "mlm_probability")}
    return {"drop_last": loader.drop_last} | dataset
