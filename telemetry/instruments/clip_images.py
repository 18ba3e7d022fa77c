"""Pictures of clips: mel spectrograms one above the other."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from telemetry.measures.audio import FRAME_SECONDS, MEL_RANGE_DB, log_mel, seconds
from telemetry.records import Clip, Image

_DPI = 100
_WIDTH, _ROW_HEIGHT, _MARGIN = 8.0, 1.6, 0.5  # inches


def spectrogram_image(tag: str, clips: Mapping[str, Clip], caption: str = "") -> Image:
    """Mel spectrograms of clips, one above the other on one time axis, each named by its key.

    Brightness is dB below the clip's own peak. A clip without samples has an empty row.
    """
    height = _ROW_HEIGHT * len(clips) + _MARGIN
    # Not pyplot, which keeps its figures and belongs to the main thread; no automatic layout, which draws twice.
    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI)
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(len(clips), 1, sharex=True, squeeze=False)[:, 0]
    figure.subplots_adjust(left=0.07, right=0.98, bottom=_MARGIN / height, top=1 - 0.05 / height, hspace=0.08)
    for axis, (name, clip) in zip(axes, clips.items(), strict=True):
        axis.set_ylabel(f"{name}\n(mel)", fontsize=8)
        axis.set_yticks([])
        axis.tick_params(labelsize=7)
        if len(clip.samples):
            mel = log_mel(clip.samples, clip.sampling_rate)
            extent = (0.0, len(mel) * FRAME_SECONDS, 0.0, float(mel.shape[1]))
            axis.imshow(mel.T, origin="lower", aspect="auto", extent=extent, vmin=-MEL_RANGE_DB, vmax=0, cmap="magma")
    longest = max((seconds(clip.samples, clip.sampling_rate) for clip in clips.values()), default=0.0)
    axes[-1].set_xlim(0, longest or 1.0)
    axes[-1].set_xlabel(f"seconds; from {-MEL_RANGE_DB:g} dB (dark) to the clip's peak (bright)", fontsize=8)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    return Image(tag, pixels, caption, voice=True)
