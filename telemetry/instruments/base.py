"""What every measuring part answers to, and what it is handed."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from telemetry.delivery.recorder import Recorder
from telemetry.families.base import Family, Layer
from telemetry.probes.lockstep import Lockstep
from telemetry.probes.sentinel import Sentinel
from telemetry.probes.watch import Watch
from telemetry.sound import SoundPolicy

if TYPE_CHECKING:
    from telemetry.probes.forward import Microbatch, Reading


COMPILED = "a compiled model is not watched by hooks"
NOT_KNOWN = "which kind of model this is, and so what is at which position, is not known"
NO_LAYERS = "telemetry does not know the layers of this model"
NO_POSITIONS = "the family cannot tell what is at which position of the batch"


@dataclass(frozen=True)
class Step:
    """All that an instrument may use, made once for a due step and once for an evaluation.

    Attributes:
        number: the optimizer step, counted as after its update.
        model: what is trained, without its DDP wrapper.
        family: how the model is read; None for one that telemetry has no family for.
        recorder: where values and records go.
        watch: hooks on the model's modules for this step. Not usable on a compiled model.
        lockstep: how ranks agree to run the model aside.
        processor: the Trainer's processing class, or None.
        tokenizer: decodes token ids: the processor's, or the processor itself.
        sound: what may be heard.
        rank: of this process.
        output_dir: where the run keeps its files.
        autocast: the precision that training computes in by autocast; None where it does not use it.
        progress: whether progress bars are wanted.
        evaluation_set: the name of the set that is evaluated on, where there are several.
        world_size: number of ranks.
        batches: number of ranks with a batch of their own: fewer where some hold parts of the same layers.
        repeats_batch: whether this rank's batch is that of a rank before it, for which telemetry counts it.
        tokens_across_ranks: whether the trainer divides its loss by the tokens of all ranks, where it counts them.
        max_grad_norm: what the trainer clips the norm of all gradients to; 0 where it does not, or nobody knows.
        sentinel: the losses of every step; None where there is none.
        scaled: whether gradients, when they are shown, still have the factor of a loss scaler, where there is one.
    """

    number: int
    model: nn.Module
    family: Family | None
    recorder: Recorder
    watch: Watch
    lockstep: Lockstep
    processor: Any = None
    tokenizer: Any = None
    sound: SoundPolicy = field(default_factory=SoundPolicy)
    rank: int = 0
    output_dir: Path = Path()
    autocast: torch.dtype | None = None
    progress: bool = True
    world_size: int = 1
    batches: int = 1
    repeats_batch: bool = False
    evaluation_set: str = ""
    tokens_across_ranks: bool = True
    scaled: bool = True
    max_grad_norm: float = 0.0
    sentinel: Sentinel | None = None

    def says(self, tag: str) -> bool:
        """Whether a tag says something of this kind of model; where it does not, the reason is said once."""
        why = self.family.meaningless.get(tag) if self.family is not None else None
        if why is not None:
            self.recorder.absent(tag, why)
        return why is None

    @functools.cached_property
    def layers(self) -> Sequence[Layer]:
        """The layers of the model, where the family knows them and they may be watched."""
        return self.family.layers() if self.family is not None and self.watch.usable else ()

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that shows."""
        return self.rank == 0


class Instrument:
    """Measures one thing of a due step. Every verb does nothing unless it is overridden.

    It keeps nothing of the run: every verb is handed the :class:`Step`. The session calls the verbs in the order of
    their definition, on the training thread, times them, and switches an instrument off that keeps failing.

    Attributes:
        every: measure every so many due steps, beginning with the first; 0 never.
    """

    every: int = 1

    @property
    def name(self) -> str:
        """What it is called where it fails."""
        return type(self).__name__

    def begin(self, step: Step) -> None:
        """A due step begins: forget what an interrupted one left, and watch what is to be watched."""

    def inputs(self, step: Step, microbatch: Microbatch) -> None:
        """The model is about to run on a microbatch."""

    def outputs(self, step: Step, microbatch: Microbatch, reading: Reading) -> None:
        """The model has run on a microbatch. The reading's tensors are the model's own: keep none of them."""

    def gradients(self, step: Step, clipped: bool | None) -> None:
        """All gradients are there; ``clipped`` says whether clipping has touched them, None where nobody knows."""

    def before_update(self, step: Step, optimizer: Any) -> None:
        """The optimizer is about to step; gradients are clipped."""

    def after_update(self, step: Step, optimizer: Any) -> None:
        """The optimizer has stepped; gradients are still there."""

    def finish(self, step: Step) -> None:
        """The due step has ended: record what is shown once a step, and let go of everything."""

    def evaluation(self, step: Step, batches: Iterable[Mapping[str, Any]]) -> None:
        """An evaluation has ended, or the first step of a fresh training is about to begin.

        Between steps, on every rank. What is recorded is written at ``step.number``.

        Args:
            step: at which the model is evaluated.
            batches: this rank's evaluation batches, on the model's device, metadata under ``metadata``. Reading them
                costs what loading them costs.
        """


class LastMicrobatchInstrument(Instrument):
    """Looks at the last microbatch of a due step, when the step has ended."""

    _last: Microbatch | None = None

    def begin(self, step: Step) -> None:
        """A due step begins: with nothing of the one before."""
        self._last = None

    def inputs(self, step: Step, microbatch: Microbatch) -> None:
        """Keep the last microbatch of the step."""
        self._last = microbatch

    def finish(self, step: Step) -> None:
        """Look at the last microbatch, and let go of it."""
        microbatch, self._last = self._last, None
        self.look(step, microbatch)

    def look(self, step: Step, microbatch: Microbatch | None) -> None:
        """The due step has ended with a microbatch; None where the model was not seen to run on any."""


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
    layers = step.layers
    if not layers:
        step.recorder.absent(section, NO_LAYERS if step.watch.usable else COMPILED)
        return []
    wanted = (0, len(layers) // 2, len(layers) - 1) if chosen is None else chosen
    beyond = [index for index in wanted if index >= len(layers)]
    if beyond:
        step.recorder.say_once("layers", "layers %s do not exist: the model has %d", beyond, len(layers))
    return [layers[index] for index in sorted(set(wanted)) if index < len(layers)]


def training_precision(step: Step) -> contextlib.AbstractContextManager[None]:
    """The precision of training: a part of a wrapped model does not come by it through the Trainer."""
    if step.autocast is None:
        return contextlib.nullcontext()
    return torch.autocast(next(step.model.parameters()).device.type, step.autocast)
