"""Any checkpoint of ours as a model to use: what `anymixer generate` and `anymixer fill-mask` start from."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from anymixer.errors import UserError
from anymixer.export.folder import build_model
from anymixer.export.source import CONFIG_NAME, open_checkpoint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from anymixer.config import PretrainConfig


@dataclass(frozen=True)
class LoadedModel:
    """auto_class: transformers' name for what the model does. model: in float32 and evaluation mode, on the CPU.
    config: of the run that saved it, None where no `config.yaml` lies beside it."""

    auto_class: str
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerFast"
    config: "PretrainConfig | None"


def load_model(source: str) -> LoadedModel:
    """The model of the checkpoint that `source` names (see `open_checkpoint`).

    Raises UserError when there is none, it is broken, or no tokenizer lies in it or beside it.
    """
    from anymixer.config import load_config

    checkpoint = open_checkpoint(source)
    if checkpoint.tokenizer is None:
        raise UserError(f"{source}: no tokenizer is in it or beside it, so it knows no text")
    auto_class, model = build_model(checkpoint)
    beside = checkpoint.folder / CONFIG_NAME
    return LoadedModel(auto_class, model, checkpoint.tokenizer, load_config(beside) if beside.is_file() else None)
