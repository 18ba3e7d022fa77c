"""Batches: those of an evaluation, read without anyone noticing, and what a trainer has prepared for a pass."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping
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


class PreparedBatch:
    """A microbatch as a trainer has prepared it, for passes over it that are not given its labels or token ids.

    Holds nothing else of it.

    Args:
        batch: what the trainer has.
        label_names: which of it are labels, beside what has ``label`` in its name. The only one is read as ``labels``
            where none is named so.
    """

    def __init__(self, batch: Mapping[str, Any], label_names: Collection[str] = ()) -> None:
        tensors = {name: value for name, value in batch.items() if isinstance(value, Tensor)}
        self._labels = {name: value for name, value in tensors.items() if "label" in name or name in label_names}
        self._others = [weakref.ref(value) for name, value in tensors.items() if name not in self._labels]
        self._ids = tensors.get("input_ids")
        named = [self._labels[name] for name in label_names if name in self._labels]
        if len(named) == 1:
            self._labels.setdefault("labels", named[0])

    def beside(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return what a pass is not given by name: labels, and the ids of what it is given embedded.

        Nothing for a pass over something else: that is given neither a tensor of the batch nor embeddings of as many
        positions as it has ids.

        Args:
            inputs: the model's keyword arguments.
        """
        embedded = inputs.get("inputs_embeds")
        is_embedded = isinstance(embedded, Tensor) and self._ids is not None and embedded.shape[:2] == self._ids.shape
        if not is_embedded and not self._shares(inputs):
            return {}
        known = self._labels | ({"input_ids": self._ids} if is_embedded and self._ids is not None else {})
        return {name: value for name, value in known.items() if inputs.get(name) is None}

    def _shares(self, inputs: Mapping[str, Any]) -> bool:
        given = {id(value) for value in inputs.values() if isinstance(value, Tensor)}
        return any((value := other()) is not None and id(value) in given for other in self._others)


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
