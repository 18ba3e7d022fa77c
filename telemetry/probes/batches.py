"""Batches: those of an evaluation, read without anyone noticing, and what a trainer has prepared for a pass."""

from __future__ import annotations

import contextlib
import copy
import functools
import random
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset


class EvaluationBatches:
    """What an evaluation data loader holds, on a device, as often as it is asked for. Reading may stop anywhere.

    Reads the loader beneath accelerate's: iterating that one talks to other ranks, and one that is left in the middle
    stays accelerate's active loader, by which it counts gradient accumulation. Of torch's loaders it reads a copy.
    Generators that the loader, its samplers, data set and collator hold are put back; for global random states see
    :func:`telemetry.probes.quiet.set_aside`.

    Args:
        loader: yields mappings; other batches are left out.
        device: where their tensors go.
    """

    def __init__(self, loader: Iterable[Any], device: torch.device | str) -> None:
        self._loader = _copied(getattr(loader, "base_dataloader", loader))
        self._device = device

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        put_back = _put_back(self._loader)
        try:
            for batch in self._loader:
                if isinstance(batch, Mapping):
                    yield {name: self._moved(value) for name, value in batch.items()}
        finally:
            put_back()

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
        device = next(value.device for value in inputs.values() if isinstance(value, Tensor))
        return {n: value.to(device, non_blocking=True) for n, value in known.items() if inputs.get(n) is None}

    def _shares(self, inputs: Mapping[str, Any]) -> bool:
        given = {id(value) for value in inputs.values() if isinstance(value, Tensor)}
        return any((value := other()) is not None and id(value) in given for other in self._others)


def is_stream(loader: Any) -> bool:
    """Whether what a loader reads may be there to be read once.

    It is an iterator, or holds one; it reads an ``IterableDataset``; the order of its samples is an iterator's.
    What can be read at any place is there again.
    """
    beneath = getattr(loader, "base_dataloader", loader)
    data = getattr(beneath, "dataset", beneath)
    if any(isinstance(sampler, Iterator) for sampler in _beneath(beneath, _SAMPLERS)):
        return True
    if isinstance(data, _READ_ONCE) or hasattr(data, "__getitem__"):
        return isinstance(data, _READ_ONCE)
    held = getattr(data, "__dict__", {}).values()
    if any(isinstance(one, _READ_ONCE) or (isinstance(one, DataLoader) and is_stream(one)) for one in held):
        return True
    return iter(data) is iter(data)


_READ_ONCE = (IterableDataset, Iterator)
_SAMPLERS = ("sampler", "batch_sampler")
_DRAWING = (*_SAMPLERS, "dataset", "datasets", "collate_fn", "__self__")


def _beneath(source: Any, names: Collection[str]) -> Iterator[Any]:
    """A loader and what it is made of, by names of attributes, and so on beneath; each once."""
    found, coming = {id(source): source}, [source]
    while coming:
        one = coming.pop()
        yield one
        for name in names:
            held = None
            with contextlib.suppress(Exception):  # of a user's own
                held = getattr(one, name, None)
            parts = held if name == "datasets" and isinstance(held, list | tuple) else [held]
            new = {id(part): part for part in parts if part is not None and id(part) not in found}
            found.update(new)
            coming.extend(new.values())


def _put_back(loader: Any) -> Callable[[], None]:
    """What puts back the random generators that a loader, its samplers, data set and collator hold."""
    held = [value for one in _beneath(loader, _DRAWING) for value in getattr(one, "__dict__", {}).values()]
    states = [restore for value in held if (restore := _restorer(value)) is not None]

    def restore_all() -> None:
        for restore in states:
            restore()

    return restore_all


def _restorer(generator: Any) -> Callable[[], Any] | None:
    if isinstance(generator, torch.Generator):
        return functools.partial(generator.set_state, generator.get_state())
    if isinstance(generator, random.Random):
        return functools.partial(generator.setstate, generator.getstate())
    if isinstance(generator, np.random.RandomState):
        return functools.partial(generator.set_state, generator.get_state())
    if isinstance(generator, np.random.Generator):
        return functools.partial(setattr, generator.bit_generator, "state", generator.bit_generator.state)
    return None


def _copied(loader: Any) -> Any:
    """A loader of torch's with what it counts for itself, and with workers that do not outlive the reading.

    Those that persist take a seed from the global random state when they begin, and go on from what they have drawn.
    """
    if not isinstance(loader, DataLoader):
        return loader
    own = copy.copy(loader)
    vars(own).update(persistent_workers=False, _iterator=None)  # a DataLoader lets nobody set the one
    return own
