"""Catches what a forward pass is given and the logits that it computes, with hooks that live for one step."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from telemetry.clock import StepClock
from telemetry.families.base import BatchView, Family, Head

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


class ForwardListener(Protocol):
    """What is told about a forward pass. Called on the training thread, without gradients."""

    def observe_inputs(self, microbatch: Microbatch) -> None:
        """The model is about to run on a microbatch."""

    def observe_logits(self, microbatch: Microbatch, head: Head, logits: Tensor) -> None:
        """A head has just computed its logits ``[batch, sequence, codebooks × vocabulary]`` (detached)."""


class ForwardProbe:
    """Hooks on a model and its heads between :meth:`attach` and :meth:`detach`; none outside.

    Args:
        model: what the Trainer calls, without its DDP or FSDP wrapper.
        family: names the heads and reads the batch.
        listener: told about every forward pass.
    """

    def __init__(self, model: nn.Module, family: Family, listener: ForwardListener) -> None:
        self._model = model
        self._family = family
        self._listener = listener
        self._handles: list[RemovableHandle] = []
        self._microbatch: Microbatch | None = None
        self._metadata: Sequence[Mapping[str, Any]] = ()
        self._unreadable_said = False
        self._clock = StepClock()
        self.forwards = 0

    def announce(self, metadata: Sequence[Mapping[str, Any]]) -> None:
        """Say what the next forward pass's samples are, where the batch itself no longer does."""
        self._metadata = metadata

    def attach(self, clock: StepClock, hooks: bool = True) -> None:
        """Start watching; forward passes are counted from here, and the time that watching takes goes to ``clock``.

        Without ``hooks`` the forward passes have to be handed over: see :meth:`replay`.
        """
        self.detach()
        self._clock = clock
        self.forwards = 0
        if not hooks:
            return
        self._handles.append(self._model.register_forward_pre_hook(self._before_forward, with_kwargs=True))
        for head in self._family.heads():
            self._handles.append(head.module.register_forward_hook(self._after_head(head)))

    def detach(self) -> None:
        """Stop watching and let go of the last microbatch."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._microbatch = None
        self._metadata = ()

    @torch.no_grad()
    def replay(self, inputs: Mapping[str, Any], outputs: Any) -> None:
        """Tell the listener about a forward pass that was handed over instead of watched."""
        inputs = dict(inputs)
        self.announce(inputs.pop("metadata", None) or self._metadata)
        microbatch = self._begin(inputs)
        for head, logits in self._family.output_logits(outputs):
            self._listener.observe_logits(microbatch, head, logits.detach())

    def _begin(self, inputs: Mapping[str, Any]) -> Microbatch:
        self.forwards += 1
        metadata, self._metadata = self._metadata, ()
        microbatch = Microbatch(inputs, self._view(inputs), metadata)
        self._listener.observe_inputs(microbatch)
        return microbatch

    def _view(self, inputs: Mapping[str, Any]) -> BatchView | None:
        """How the family reads a batch; None for one that it cannot, which the model may still be able to."""
        try:
            return self._family.view(inputs)
        except Exception:
            if not self._unreadable_said:
                logger.exception("family %s cannot read a batch; training goes on", self._family.name)
            self._unreadable_said = True
            return None

    @torch.no_grad()
    def _before_forward(self, _module: nn.Module, _args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        with self._clock.running():
            self._microbatch = self._begin(kwargs)

    def _after_head(self, head: Head) -> Any:
        @torch.no_grad()
        def hook(_module: nn.Module, _args: tuple[Any, ...], logits: Tensor) -> None:
            if self._microbatch is None:
                return
            with self._clock.running():
                self._listener.observe_logits(self._microbatch, head, logits.detach())

        return hook
