"""Which layers of a model are looked into."""

from __future__ import annotations

from collections.abc import Sequence

from telemetry.families.base import Layer
from telemetry.instruments.base import Step

COMPILED = "a compiled model is not watched by hooks"
NO_LAYERS = "telemetry does not know the layers of this model"


def probed_layers(step: Step, chosen: Sequence[int] | None, section: str) -> list[Layer]:
    """Return the chosen layers that the model has: by default the first, the middle and the last.

    What is missing, and why, is said once.

    Args:
        step: whose model is watched.
        chosen: indices from 0, or None for the default.
        section: of the tags that are absent where there is no layer.
    """
    if step.family is None:
        return []
    layers = step.family.layers() if step.watch.usable else ()
    if not layers:
        step.recorder.absent(section, NO_LAYERS if step.watch.usable else COMPILED)
        return []
    wanted = (0, len(layers) // 2, len(layers) - 1) if chosen is None else chosen
    beyond = [index for index in wanted if index >= len(layers)]
    if beyond:
        step.recorder.say_once("layers", "layers %s do not exist: the model has %d", beyond, len(layers))
    return [layers[index] for index in sorted(set(wanted)) if index < len(layers)]
