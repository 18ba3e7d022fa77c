"""Brings many small tensors to the host with one copy a device, started now and waited for later."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Transfer:
    """Host copies of tensors. Making one launches device work and returns; only :meth:`wait` waits.

    All tensors of a device are packed into one buffer of bytes, which goes to pinned memory before an event.
    The tensors may change afterwards: the copy is of their values now.

    Args:
        tensors: of any shapes, dtypes and devices.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._count = len(tensors)
        self._packed = [_Packed([(index, tensors[index]) for index in group]) for group in _by_device(tensors)]

    @property
    def nbytes(self) -> int:
        """Bytes held on the host."""
        return sum(packed.nbytes for packed in self._packed)

    def wait(self) -> list[Tensor]:
        """The host copies, in the order of the tensors."""
        copies: dict[int, Tensor] = {}
        for packed in self._packed:
            copies.update(packed.wait())
        return [copies[index] for index in range(self._count)]


class _Run(NamedTuple):
    """Tensors of one dtype side by side: so many of no dimension, then those of these shapes."""

    dtype: torch.dtype
    indices: list[int]
    single: int
    shapes: list[torch.Size]


class _Packed:
    """The tensors of one device, as bytes."""

    def __init__(self, indexed: Sequence[tuple[int, Tensor]]) -> None:
        runs = defaultdict[torch.dtype, list[tuple[int, Tensor]]](list)
        for index, tensor in indexed:
            runs[tensor.dtype].append((index, tensor.detach()))
        # Widest first, so that every run is aligned for its dtype; in each those with one value, which are stacked.
        ordered = sorted(runs.items(), key=lambda run: (-run[0].itemsize, str(run[0])))
        self._layout: list[_Run] = []
        parts: list[Tensor] = []
        for dtype, run in ordered:
            single = [pair for pair in run if pair[1].dim() == 0]
            several = [pair for pair in run if pair[1].dim() > 0]
            shapes = [tensor.shape for _, tensor in several]
            self._layout.append(_Run(dtype, [index for index, _ in (*single, *several)], len(single), shapes))
            if single:
                parts.append(torch.stack([tensor for _, tensor in single]).view(torch.uint8))
            if several:
                parts.append(torch.cat([tensor.reshape(-1) for _, tensor in several]).view(torch.uint8))
        self._on_device = torch.cat(parts)
        self._event: torch.cuda.Event | None = None
        if self._on_device.is_cuda:
            self._on_host = torch.empty(self._on_device.shape, dtype=torch.uint8, pin_memory=True)
            self._on_host.copy_(self._on_device, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(self._on_device.device))
        else:
            self._on_host = self._on_device.to("cpu")

    @property
    def nbytes(self) -> int:
        return self._on_host.numel()

    def wait(self) -> dict[int, Tensor]:
        if self._event is not None:
            self._event.synchronize()
        copies: dict[int, Tensor] = {}
        start = 0
        for run in self._layout:
            sizes = [shape.numel() for shape in run.shapes]
            end = start + (run.single + sum(sizes)) * run.dtype.itemsize
            values = self._on_host[start:end].view(run.dtype)
            several = values[run.single :].split(sizes) if sizes else ()
            found = [one.view(shape) for one, shape in zip(several, run.shapes, strict=True)]
            copies.update(zip(run.indices, (*values[: run.single].unbind(), *found), strict=True))
            start = end
        return copies


def _by_device(tensors: Sequence[Tensor]) -> list[list[int]]:
    groups: dict[torch.device, list[int]] = {}
    for index, tensor in enumerate(tensors):
        groups.setdefault(tensor.device, []).append(index)
    return list(groups.values())
