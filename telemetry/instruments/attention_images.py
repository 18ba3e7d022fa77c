"""Draws attention: between kinds of positions, and head by head. In the background, without pyplot's shared state."""

from __future__ import annotations

import functools
import itertools
import math
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from telemetry.measures.attention import KINDS
from telemetry.records import Image

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

DPI = 100
COLUMNS = 4  # layers side by side
TICKS = 16
SCALE: dict[str, Any] = {"cmap": "cividis", "vmin": 0.0, "vmax": 1.0}  # colours that everybody can tell apart
MASS_CAPTION = "Rows: the positions that look, columns: those looked at. Sampled queries of all ranks, mean over heads."
HEADS_CAPTION = "Share of the attention of target positions that goes to the reference. Sampled queries of all ranks."
NOT_THERE = "–"

_drawing = threading.Lock()


def mass_image(masses: Mapping[int, np.ndarray]) -> Image:
    """``attention/mass``: one matrix for each layer, the values in its cells.

    Args:
        masses: layer → float64 ``[kinds, kinds]``, from row to column; NaN where there is none.
    """
    layers = tuple(sorted(masses))
    with _drawing:
        pixels = _mass_picture(layers).filled([masses[layer] for layer in layers])
    return Image("attention/mass", pixels, MASS_CAPTION)


def heads_image(heads: Mapping[int, np.ndarray]) -> Image:
    """``attention/heads``: attention from target to reference by layer and head.

    Args:
        heads: layer → float64 ``[heads]``.
    """
    layers = tuple(sorted(heads))
    most = max(len(heads[layer]) for layer in layers)
    values = np.full((len(layers), most), np.nan)
    for row, layer in enumerate(layers):
        values[row, : len(heads[layer])] = heads[layer]
    with _drawing:
        pixels = _heads_picture(layers, most).filled([values])
    return Image("attention/heads", pixels, HEADS_CAPTION)


class _Picture:
    """A figure of which only the values change: all else is drawn once, since drawing text holds training's thread up.

    Args:
        figure: with everything on it but values.
        panels: where matrices of the given shapes go.
        written: whether values are written in their cells.
    """

    def __init__(self, figure: Figure, panels: Sequence[tuple[Axes, AxesImage]], written: bool) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        self._panels = panels
        self._texts = [_cells(axes, image) if written else {} for axes, image in panels]
        for artist in self._artists():
            artist.set_animated(True)  # left out of what is drawn once
        self._canvas = FigureCanvasAgg(figure)
        self._canvas.draw()
        self._empty = self._canvas.copy_from_bbox(figure.bbox)

    def filled(self, matrices: Sequence[np.ndarray]) -> np.ndarray:
        """uint8 ``[height, width, 3]``, with these values in the panels."""
        self._canvas.restore_region(self._empty)  # type: ignore[attr-defined]
        for (_, image), texts, matrix in zip(self._panels, self._texts, matrices, strict=True):
            image.set_data(matrix)
            for place, text in texts.items():
                value = matrix[place]
                text.set_text(NOT_THERE if math.isnan(value) else f"{value:.2f}")
                text.set_color("black" if value > 0.5 or value != value else "white")
        for artist in self._artists():
            artist.draw(self._canvas.get_renderer())
        return np.asarray(self._canvas.buffer_rgba())[..., :3].copy()

    def _artists(self) -> list[Artist]:
        """What changes, in the order of drawing."""
        images: list[Artist] = [image for _, image in self._panels]
        return images + [text for texts in self._texts for text in texts.values()]


def _cells(axes: Axes, image: AxesImage) -> dict[tuple[int, int], Any]:
    """A text for every cell of a matrix, still empty."""
    rows, columns = image.get_size()
    places = itertools.product(range(rows), range(columns))
    return {(row, column): axes.text(column, row, "", ha="center", va="center") for row, column in places}


@functools.lru_cache(maxsize=2)
def _mass_picture(layers: tuple[int, ...]) -> _Picture:
    columns = min(len(layers), COLUMNS)
    rows = math.ceil(len(layers) / columns)
    width, height = 2.2 + 1.9 * columns, 0.1 + 2.4 * rows
    figure = _figure(width, height)
    edges = {"left": 0.95 / width, "right": 1 - 1.05 / width, "bottom": 0.55 / height, "top": 1 - 0.3 / height}
    grid = figure.subplots(rows, columns, squeeze=False, gridspec_kw={**edges, "wspace": 0.12, "hspace": 0.5})
    for axes in grid.flat[len(layers) :]:
        axes.set_visible(False)
    panels = []
    for index, (axes, layer) in enumerate(zip(grid.flat, layers, strict=False)):
        panels.append((axes, axes.imshow(np.zeros((len(KINDS), len(KINDS))), **SCALE)))
        axes.set_title(f"layer {layer}", fontsize=11)
        axes.set_xticks(range(len(KINDS)), KINDS)
        axes.set_yticks(range(len(KINDS)), KINDS if index % columns == 0 else [""] * len(KINDS))
        axes.tick_params(labelsize=8, length=0)
        axes.set_xlabel("to")
        if index % columns == 0:
            axes.set_ylabel("from")
    bar = figure.add_axes((1 - 0.85 / width, edges["bottom"], 0.15 / width, edges["top"] - edges["bottom"]))
    figure.colorbar(panels[0][1], cax=bar, label="attention mass")
    return _Picture(figure, panels, written=True)


@functools.lru_cache(maxsize=2)
def _heads_picture(layers: tuple[int, ...], heads: int) -> _Picture:
    width, height = 7.0, min(4.0, 1.4 + 0.32 * len(layers))
    figure = _figure(width, height)
    edges = {"left": 0.7 / width, "right": 1 - 1.1 / width, "bottom": 0.55 / height, "top": 1 - 0.35 / height}
    axes = figure.subplots(gridspec_kw=edges)
    image = axes.imshow(np.zeros((len(layers), heads)), aspect="auto", **SCALE)
    axes.set_title("attention from target to reference", fontsize=11)
    axes.set_xlabel("head")
    axes.set_ylabel("layer")
    places = _some(heads)
    axes.set_xticks(places, [str(place) for place in places])
    places = _some(len(layers))
    axes.set_yticks(places, [str(layers[place]) for place in places])
    bar = figure.add_axes((1 - 0.9 / width, edges["bottom"], 0.15 / width, edges["top"] - edges["bottom"]))
    figure.colorbar(image, cax=bar, label="share of attention")
    return _Picture(figure, [(axes, image)], written=False)


def _some(count: int) -> list[int]:
    """Places of as many of them, evenly spaced, as can be read."""
    return list(range(0, count, math.ceil(count / TICKS)))


def _figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches."""
    from matplotlib.figure import Figure  # here: only the background thread of rank 0 draws

    # No automatic layout, which draws twice.
    return Figure(figsize=(width, height), dpi=DPI)
