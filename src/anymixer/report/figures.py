"""Saves pictures."""

import io
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_figure(figure: "Figure", path: Path) -> None:
    """Write a PNG of 256 colours, a third of the size; a reader finds the old picture or the new one."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    drawn, temporary = io.BytesIO(), path.with_name(f".{path.name}")
    figure.savefig(drawn, format="png")
    try:
        Image.open(drawn).convert("RGB").quantize(256).save(temporary, format="png", optimize=True)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
