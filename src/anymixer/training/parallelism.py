"""FSDP2 from the YAML, and which modules it shards as units."""

import functools
import warnings
from typing import TYPE_CHECKING, Any

from torch import nn

from anymixer.training.named_table import NamedTable

if TYPE_CHECKING:
    from composer.utils.parallelism import FSDP2Config

PARALLELISM = NamedTable(
    section="parallelism_config",
    factories={"fsdp": "composer.utils.parallelism:FSDP2Config"},
)


def build_parallelism(section: dict[str, Any] | None) -> "dict[str, FSDP2Config] | None":
    """Return Composer's `parallelism_config` for the YAML's, or None for plain data parallelism.

    Composer takes a dict there for FSDP1, so the FSDP2Config object itself is handed over. Unless the YAML says
    otherwise, checkpoints are whole files (`state_dict_type: full`), which load with any number of ranks and into
    any other tool; and numbers are those of one rank (`mixed_precision: FULL`), where Composer's DEFAULT hands out all
    weights, decays and norms among them, and the residual stream in bfloat16.
    """
    if not section:
        return None
    fsdp = {"state_dict_type": "full", "mixed_precision": "FULL"} | dict(section.get("fsdp") or {})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="FSDP2 Config/APIs are experimental")
        return {"fsdp": PARALLELISM.build_one("fsdp", fsdp)}


def mark_repeated_layers(model: nn.Module) -> None:
    """Tell Composer to shard, and where asked to recompute, each repeated layer of a model on its own.

    The layers are the members of the model's outermost ModuleLists; a model that already has an
    `fsdp_wrap_fn` (or `activation_checkpointing_fn`) of its own keeps it.
    """
    is_layer = functools.partial(_is_instance_of, tuple(_layer_classes(model)))
    for name in ("fsdp_wrap_fn", "activation_checkpointing_fn"):
        if not hasattr(model, name):
            setattr(model, name, is_layer)


def _layer_classes(module: nn.Module) -> set[type[nn.Module]]:
    classes: set[type[nn.Module]] = set()
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            classes |= {type(layer) for layer in child}
        else:
            classes |= _layer_classes(child)
    return classes


def _is_instance_of(classes: tuple[type[nn.Module], ...], module: nn.Module) -> bool:
    return isinstance(module, classes)
