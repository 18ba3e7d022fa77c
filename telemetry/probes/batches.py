"""Evaluation batches, read without anyone noticing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset


class EvaluationBatches:
    """What an evaluation data loader holds, on a device, as often as it is asked for. Reading may stop anywhere.

    Reads the loader beneath accelerate's: iterating that one talks to other ranks, and one that is left in the middle
    stays accelerate's active loader, by which it counts gradient accumulation. Generators that the loader draws from
    are put back; for torch's global random state see :func:`telemetry.probes.quiet.set_aside`.

    Args:
        loader: yields mappings; other batches are left out.
        device: where their tensors go.
    """

    def __init__(self, loader: Iterable[Any], device: torch.device | str) -> None:
        self._loader = getattr(loader, "base_dataloader", loader)
        self._device = device

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        states = [(generator, generator.get_state()) for generator in _generators(self._loader)]
        try:
            for batch in self._loader:
                if isinstance(batch, Mapping):
                    yield {name: self._moved(value) for name, value in batch.items()}
        finally:
            for generator, state in states:
                generator.set_state(state)

    def _moved(self, value: Any) -> Any:
        return value.to(self._device, non_blocking=True) if isinstance(value, Tensor) else value


def is_stream(loader: Any) -> bool:
    """Whether what a loader reads may be there to be read once: it is an iterator, or reads an ``IterableDataset``."""
    beneath = getattr(loader, "base_dataloader", loader)
    data = getattr(beneath, "dataset", beneath)
    return isinstance(data, IterableDataset | Iterator)


def _generators(source: Any) -> list[torch.Generator]:
    """The random generators of a loader and of the samplers beneath it."""
    own = getattr(source, "generator", None)
    found = [own] if isinstance(own, torch.Generator) else []
    for name in ("sampler", "batch_sampler"):
        beneath = getattr(source, name, None)
        if beneath is not None:
            found += _generators(beneath)
    return found
