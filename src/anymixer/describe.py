"""What a configuration comes to, before anything runs: parameters layer by layer, and the token budget."""

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from anymixer.config import PretrainConfig, dump_config
from anymixer.data import maskings
from anymixer.models import build_model
from anymixer.training.times import parse_time


def print_dry_run(config: PretrainConfig) -> None:
    """Print the resolved configuration, the parameter table and the token budget; touches no device, no data."""
    console = Console()
    print(dump_config(config), end="")
    model = build_on_meta(config)
    console.print(parameter_table(model))
    print(f"{count_parameters(model):,} parameters")
    print(token_budget(config))


def build_on_meta(config: PretrainConfig) -> nn.Module:
    """The configured model without storage for its parameters."""
    # Imported first: importing it makes tensors, which fails where they have no storage.
    import transformers.modeling_utils  # noqa: F401

    with torch.device("meta"):
        return build_model(config.model, load_weights=False)


def count_parameters(module: nn.Module) -> int:
    """Number of parameters, those that are shared counted once."""
    return sum(p.numel() for p in module.parameters())


def parameter_table(model: nn.Module) -> Table:
    """One row per embedding, layer and head, with what is inside and how many parameters it adds."""
    table = Table("part", "contains", "parameters", title="Parameters")
    table.columns[-1].justify = "right"
    seen: set[int] = set()
    for name, module in _parts(model, ""):
        own = [p for p in module.parameters() if id(p) not in seen]
        seen.update(id(p) for p in own)
        table.add_row(name, _contents(module), f"{sum(p.numel() for p in own):,}")
    return table


def _parts(module: nn.Module, prefix: str) -> list[tuple[str, nn.Module]]:
    """The model's parts worth a row: descend through wrappers, one row per item of a list of layers."""
    parts = []
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        wraps_layers = any(isinstance(m, nn.ModuleList) for m in child.modules())
        if isinstance(child, nn.ModuleList):
            parts += [(f"{path}.{i}", layer) for i, layer in enumerate(child)]
        elif wraps_layers:
            parts += _parts(child, f"{path}.")
        elif any(True for _ in child.parameters()):
            parts.append((path, child))
    return parts


def _contents(module: nn.Module) -> str:
    from anymixer.layers.channel_mixers import ChannelMixer
    from anymixer.mixers import SequenceMixer

    mixers = [type(m).__name__ for m in module.modules() if isinstance(m, (SequenceMixer, ChannelMixer))]
    return " + ".join(mixers) or type(module).__name__


def token_budget(config: PretrainConfig) -> str:
    """How many positions the run processes, in one line; padding counts, because it is computed."""
    value, unit = parse_time(config.max_duration, "max_duration")
    per_step = config.global_train_batch_size * config.max_seq_len
    start = f"{config.global_train_batch_size:,} x {config.max_seq_len} = {per_step:,} tokens a step"
    if unit == "ep":
        return f"{start}, {value:g} passes over the data"
    steps = {"ba": value, "sp": value / config.global_train_batch_size, "tok": value / per_step}[unit]
    share = maskings.parse(config.masking, "masking")[1].chosen_share(config.mlm_probability)
    return f"{start}, {steps:,.0f} steps, {steps * per_step / 1e9:,.3f} billion tokens, {share:.0%} of them predicted"
