"""Draws attention: between kinds of positions, and head by head. In the background, without pyplot's shared state."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from telemetry.measures.attention import KINDS
from telemetry.records import Image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 100
COLUMNS = 4  # layers side by side
TICKS = 16
SCALE: dict[str, Any] = {"cmap": "cividis", "vmin": 0.0, "vmax": 1.0}  # colours that everybody can tell apart
MASS_CAPTION = "Rows: the positions that look, columns: those looked at. Sampled queries of all ranks, mean over heads."
HEADS_CAPTION = "Share of the attention of target positions that goes to the reference. Sampled queries of all ranks."
NOT_THERE = "–"


def mass_image(masses: Mapping[int, np.ndarray]) -> Image:
    """``attention/mass``: one matrix for each layer, the values in its cells.

    Args:
        masses: layer → float64 ``[kinds, kinds]``, from row to column; NaN where there is none.
    """
    columns = min(len(masses), COLUMNS)
    rows = math.ceil(len(masses) / columns)
    figure = _figure(1.2 + 2.0 * columns, 0.2 + 2.4 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(masses) :]:
        axes.set_visible(False)
    for index, (axes, (layer, mass)) in enumerate(zip(grid.flat, sorted(masses.items()), strict=False)):
        image = axes.imshow(mass, **SCALE)
        axes.set_title(f"layer {layer}", fontsize=11)
        axes.set_xticks(range(len(KINDS)), KINDS)
        axes.set_yticks(range(len(KINDS)), KINDS if index % columns == 0 else [""] * len(KINDS))
        axes.tick_params(labelsize=8, length=0)
        axes.set_xlabel("to")
        if index % columns == 0:
            axes.set_ylabel("from")
        for row, column in itertools.product(range(len(KINDS)), repeat=2):
            _write(axes, row, column, mass[row, column])
    figure.colorbar(image, ax=grid, label="attention mass")
    return Image("attention/mass", _pixels(figure), MASS_CAPTION)


def heads_image(heads: Mapping[int, np.ndarray]) -> Image:
    """``attention/heads``: attention from target to reference by layer and head.

    Args:
        heads: layer → float64 ``[heads]``.
    """
    layers = sorted(heads)
    most = max(len(heads[layer]) for layer in layers)
    values = np.full((len(layers), most), np.nan)
    for row, layer in enumerate(layers):
        values[row, : len(heads[layer])] = heads[layer]
    figure = _figure(7.0, min(4.0, 1.4 + 0.32 * len(layers)))
    axes = figure.subplots()
    image = axes.imshow(values, aspect="auto", **SCALE)
    axes.set_title("attention from target to reference", fontsize=11)
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    places = _some(most)
    axes.set_xticks(places, [str(place) for place in places])
    places = _some(len(layers))
    axes.set_yticks(places, [str(layers[place]) for place in places])
    figure.colorbar(image, ax=axes, label="share of attention")
    return Image("attention/heads", _pixels(figure), HEADS_CAPTION)


def _some(count: int) -> list[int]:
    """Places of as many of them, evenly spaced, as can be read."""
    return list(range(0, count, math.ceil(count / TICKS)))


def _write(axes: Any, row: int, column: int, value: float) -> None:
    text = NOT_THERE if math.isnan(value) else f"{value:.2f}"
    axes.text(column, row, text, ha="center", va="center", color="black" if value > 0.5 or value != value else "white")


def _figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches."""
    from matplotlib.figure import Figure  # here: only the background thread of rank 0 draws

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def _pixels(figure: Figure) -> np.ndarray:
    """uint8 ``[height, width, 3]``."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
