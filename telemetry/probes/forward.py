"""Reads the passes of a step: what the model is given, and the logits that it computes."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from telemetry.families.base import BatchView, Family, Head
from telemetry.probes.watch import Watch

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Microbatch:
    """One forward pass of a step.

    Attributes:
        inputs: the model's keyword arguments.
        view: how the family reads them; None where it cannot.
        metadata: one mapping a sample of what the model does not see, or empty where the trainer offers none.
            Keys, all optional: ``sample_id``, ``speaker``, ``language``, ``ref_transcript``, ``target_transcript``
            (str); ``reference``, ``target`` (sequences of objects with ``samples``, ``sampling_rate``, ``seconds``
            and, where samples were resampled, ``file_sampling_rate``; read in the background).
    """

    inputs: Mapping[str, Any]
    view: BatchView | None
    metadata: Sequence[Mapping[str, Any]] = ()

    def sample_id(self, row: int) -> str:
        """Name of a sample: its id, or its row in the batch."""
        known = self.metadata[row].get("sample_id") if row < len(self.metadata) else None
        return str(known) if known is not None else f"row {row}"


class PassReader:
    """Reads every pass of a due step, watched or handed over.

    Args:
        family: reads the batch and names the heads; None for a model that telemetry has no family for.
        inputs: told of a microbatch that the model is about to run on.
        outputs: told of a microbatch, a head and the logits that it has computed (detached).
    """

    def __init__(
        self,
        family: Family | None,
        inputs: Callable[[Microbatch], None],
        outputs: Callable[[Microbatch, Head, Tensor], None],
    ) -> None:
        self._family = family
        self._inputs = inputs
        self._outputs = outputs
        self._microbatch: Microbatch | None = None
        self._metadata: Sequence[Mapping[str, Any]] = ()
        self._unreadable_said = False
        self.passes = 0

    def announce(self, metadata: Sequence[Mapping[str, Any]]) -> None:
        """Say what the next pass's samples are, where the batch itself no longer does."""
        self._metadata = metadata

    def attach(self, watch: Watch) -> None:
        """Begin to read; passes are counted from here."""
        self.forget()
        self.passes = 0
        watch.passes(self, self._begin, self._end)
        for head in self._family.heads() if self._family is not None else ():
            watch.after(self, head.module, functools.partial(self._see, head))

    def forget(self) -> None:
        """Let go of the last microbatch."""
        self._microbatch = None
        self._metadata = ()

    @torch.no_grad()
    def replay(self, inputs: Mapping[str, Any], outputs: Any) -> None:
        """Read a pass that was handed over instead of watched."""
        inputs = dict(inputs)
        self.announce(inputs.pop("metadata", None) or self._metadata)
        self._begin(inputs)
        for head, logits in self._family.output_logits(outputs) if self._family is not None else ():
            self._see(head, logits)
        self._end(outputs)

    def _begin(self, inputs: Mapping[str, Any]) -> None:
        self.passes += 1
        metadata, self._metadata = self._metadata, ()
        self._microbatch = Microbatch(inputs, self._view(inputs), metadata)
        self._inputs(self._microbatch)

    def _see(self, head: Head, logits: Tensor) -> None:
        if self._microbatch is not None:
            self._outputs(self._microbatch, head, logits.detach())

    def _end(self, _outputs: Any) -> None:
        self._microbatch = None

    def _view(self, inputs: Mapping[str, Any]) -> BatchView | None:
        """How the family reads a batch; None for one that it cannot, which the model may still be able to."""
        if self._family is None:
            return None
        try:
            return self._family.view(inputs)
        except Exception:
            if not self._unreadable_said:
                logger.exception("family %s cannot read a batch; training goes on", self._family.name)
            self._unreadable_said = True
            return None
