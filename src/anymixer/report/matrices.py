"""Pictures of mixing matrices on a sentence, before and after training: one PNG a run, and a README that shows them.

    anymixer report matrices runs/demo-hydra runs/demo-attention --output gallery

Rows are layers (the first, the middle one, the last), columns heads, first at initialization, then trained. A pixel
(i, j) is how much token i takes from token j: red adds, blue subtracts. Each picture has its own scale, written
above it: symmetric about 0, or the range of entries that are all about alike. The strongest 5 % are saturated, so
that a heavy diagonal does not hide the rest.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from anymixer.config import PretrainConfig
from anymixer.errors import UserError
from anymixer.files import write_text_atomic
from anymixer.fill_mask import load_run
from anymixer.mixers import SequenceMixer, mixers
from anymixer.models import build_model
from anymixer.pretrain import SUMMARY_NAME
from anymixer.report.figures import save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DEFAULT_TEXT = (
    "If the file does not exist, the function raises an error; otherwise it returns a list of all lines of the file."
)
MAX_HEADS = 3
MAX_LAYERS = 3
# Of |M|: above this share of its entries the colours saturate.
SATURATED = 0.95
_PANEL_INCHES = 1.75
_LABELLED_TOKENS = 40
_DPI = 100


@dataclass(frozen=True)
class LayerMatrices:
    """Mixing matrices of one layer for one sentence.

    layer: its number from 0. mixer: its registered name; summary: what that is. heads: the numbers of the heads
    shown, of `num_heads`. matrices: float [len(heads), length, length].
    """

    layer: int
    mixer: str
    summary: str
    heads: tuple[int, ...]
    num_heads: int
    matrices: NDArray[np.float32]


@dataclass(frozen=True)
class RunMatrices:
    """What one picture shows: the same layers and heads at initialization and after training.

    name: the run's. spec: the mixer or mixers as the run's YAML file names them.
    """

    name: str
    spec: Any
    tokens: tuple[str, ...]
    initial: tuple[LayerMatrices, ...]
    trained: tuple[LayerMatrices, ...]


def report_matrices(folders: Sequence[Path], output: Path, text: str = DEFAULT_TEXT) -> list[Path]:
    """Draw each run's picture into `output` with an index, README.md; return the files written.

    Raises UserError for a folder that is no run, a text that is too long for it, or a model without mixers.
    """
    names = [_run_name(folder) for folder in folders]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"runs: two of them are called '{name}', and so would be their pictures; rename a folder")
    runs = [run_matrices(folder, text) for folder in folders]
    written = []
    for run in runs:
        path = output / f"{run.name}.png"
        save_figure(draw_matrices(run), path)
        written.append(path)
    index = output / "README.md"
    write_text_atomic(index, _index(runs, folders, output, text))
    return [*written, index]


def run_matrices(folder: Path, text: str) -> RunMatrices:
    """The matrices of a run's model for `text`, as it was when training began and as it was saved."""
    model, tokenizer, config = load_run(folder)
    ids = torch.tensor([tokenizer.encode(text)])
    if ids.shape[1] > config.max_seq_len:
        raise UserError(f"--text: {ids.shape[1]} tokens are more than max_seq_len = {config.max_seq_len} of {folder}")
    tokens = tuple(str(token) for token in tokenizer.convert_ids_to_tokens(ids[0].tolist()))
    initial, trained = (layer_matrices(m, ids) for m in (initial_model(config), model))
    if not trained:
        raise UserError(f"{folder}: its model ({config.model.name}) has no sequence mixer to draw")
    return RunMatrices(_run_name(folder), config.model.mixer, tokens, initial, trained)


def _run_name(folder: Path) -> str:
    return folder.resolve().name


def initial_model(config: PretrainConfig) -> nn.Module:
    """The model as training found it: the weights that the configuration's seed draws."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return build_model(config.model).eval()


@torch.no_grad()
def layer_matrices(model: nn.Module, input_ids: Tensor) -> tuple[LayerMatrices, ...]:
    """Matrices of the first, middle and last layer of `model` for input_ids [1, length], at most MAX_HEADS each."""
    layers = [module for module in model.modules() if isinstance(module, SequenceMixer)]
    shown = _spread(len(layers), MAX_LAYERS)
    inputs: dict[int, tuple[Any, ...]] = {}

    def keep(layer: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, arguments: inputs.update({layer: arguments})

    hooks = [layers[i].register_forward_pre_hook(keep(i)) for i in shown]
    try:
        model(input_ids=input_ids)
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(_of_layer(layers[i], i, layers[i].matrix(*inputs[i])[0]) for i in shown)


def _of_layer(mixer: SequenceMixer, layer: int, matrices: Tensor) -> LayerMatrices:
    heads = _spread(len(matrices), MAX_HEADS)
    summary = (type(mixer).__doc__ or "").strip().split("\n")[0]
    return LayerMatrices(layer, _name(mixer), summary, heads, len(matrices), matrices[list(heads)].float().numpy())


def _spread(count: int, most: int) -> tuple[int, ...]:
    """At most `most` of `count` numbers from 0, evenly spread, the first and the last among them."""
    return tuple(dict.fromkeys(round(x) for x in np.linspace(0, count - 1, min(count, most)))) if count else ()


def _name(mixer: SequenceMixer) -> str:
    return next((name for name in mixers.names() if mixers.get(name) is type(mixer)), type(mixer).__name__)


def draw_matrices(run: RunMatrices) -> "Figure":
    """One figure: a row a layer; a column a head, at initialization on the left, trained on the right."""
    from matplotlib.figure import Figure

    columns = max(len(layer.heads) for layer in run.trained)
    rows = len(run.trained)
    size = (2 * columns * _PANEL_INCHES + 1.6, rows * (_PANEL_INCHES + 0.1) + 1.25)
    figure = Figure(figsize=size, dpi=_DPI, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.01, hspace=0.01)  # type: ignore[union-attr]
    halves: Any = figure.subfigures(1, 2)
    for half, title, layers in zip(halves, ("at initialization", "trained"), (run.initial, run.trained)):
        half.suptitle(title, fontsize=10)
        grid = half.subplots(rows, columns, squeeze=False)
        for row, layer in enumerate(layers):
            for column in range(columns):
                if column >= len(layer.heads):
                    grid[row][column].axis("off")
                    continue
                axes = grid[row][column]
                _draw_one(axes, layer, column)
                _label_tokens(axes, run.tokens, left=column == 0, below=row == rows - 1)
            grid[row][0].set_ylabel(f"layer {layer.layer + 1}: {layer.mixer}", fontsize=8)
    return figure


def _draw_one(axes: "Axes", layer: LayerMatrices, index: int) -> None:
    matrix = layer.matrices[index]
    colours, low, high = _scale(matrix)
    axes.imshow(matrix, cmap=colours, vmin=low, vmax=high, interpolation="nearest")
    shown = f"\N{PLUS-MINUS SIGN}{high:.2g}" if low == -high else f"{low:.3g} to {high:.3g}"
    axes.set_title(f"head {layer.heads[index] + 1} of {layer.num_heads}, {shown}", fontsize=7)
    for spine in axes.spines.values():
        spine.set_linewidth(0.3)


def _scale(matrix: NDArray[np.float32]) -> tuple[str, float, float]:
    """Colours and the values at their ends: symmetric about 0, or the range of entries that are all about alike."""
    low, high = (float(x) for x in np.quantile(matrix, (1 - SATURATED, SATURATED)))
    if low > high / 2 > 0:
        return "Reds", low, high
    if high < low / 2 < 0:
        return "Blues_r", low, high
    limit = float(np.quantile(np.abs(matrix), SATURATED)) or float(np.abs(matrix).max()) or 1.0
    return "RdBu_r", -limit, limit


def _label_tokens(axes: "Axes", tokens: Sequence[str], *, left: bool, below: bool) -> None:
    """Write the tokens beside and below a picture, or every n-th where they would run into each other."""
    places = list(range(0, len(tokens), -(-len(tokens) // _LABELLED_TOKENS)))
    shown = [tokens[place].replace("$", r"\$") for place in places]
    axes.tick_params(length=1, width=0.3, pad=1)
    axes.set_xticks(places, shown if below else [], rotation=90, fontsize=5)
    axes.set_yticks(places, shown if left else [], fontsize=5)


def _index(runs: Sequence[RunMatrices], folders: Sequence[Path], output: Path, text: str) -> str:
    """The README of the pictures: what they show, how they were made, and a paragraph for each run."""
    lines = [
        "# Mixing matrices",
        "",
        f"Every mixer's matrix on one sentence: *{text}*",
        "",
        "Rows are layers, columns heads, first at initialization, then trained. A pixel (i, j) is how much token i",
        "takes from token j: red adds, blue subtracts. Each picture has its own scale, written above it: symmetric",
        "about 0, or the range of entries that are all about alike. The strongest 5 % are saturated, so that a heavy",
        "diagonal does not hide the rest. Made by",
        "",
        "```",
        f"anymixer report matrices {' '.join(map(str, folders))} --output {output}",
        "```",
    ]
    for run, folder in zip(runs, folders):
        kinds = {layer.mixer: layer.summary for layer in run.trained}
        specs = run.spec if isinstance(run.spec, (list, tuple)) else [run.spec]
        lines += ["", f"## {run.name}", "", *kinds.values(), *_reached(folder / SUMMARY_NAME)]
        lines += ["", "```yaml", *(f"mixer: {_inline(spec)}" for spec in specs), "```"]
        lines += ["", f"![mixing matrices of {run.name}]({run.name}.png)"]
    return "\n".join(lines) + "\n"


def _inline(spec: Any) -> str:
    """A mixer's specification as one line of YAML."""
    if not isinstance(spec, Mapping):
        return str(spec)
    return "{" + ", ".join(f"{key}: {json.dumps(value).strip(chr(34))}" for key, value in spec.items()) + "}"


def _reached(summary: Path) -> list[str]:
    """How far the run trained, in one line, where its summary says so."""
    if not summary.is_file():
        return []
    results = json.loads(summary.read_text(encoding="utf-8"))
    return [f"Trained for {results['steps']:,} steps, to a held-out loss of {results['after']['loss']:.3f} nats."]
