"""Brings many small tensors to the host with one copy a device, started now and waited for later."""

from __future__ import annotations

from collections.abc import Sequence

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
        self._shapes = [tensor.shape for tensor in tensors]
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
        return [copies[index].view(shape) for index, shape in enumerate(self._shapes)]


class _Packed:
    """The tensors of one device, as bytes."""

    def __init__(self, indexed: Sequence[tuple[int, Tensor]]) -> None:
        # Widest first, so that every part is aligned for its dtype.
        ordered = sorted(indexed, key=lambda pair: (-pair[1].element_size(), str(pair[1].dtype)))
        self._layout = [(index, tensor.dtype, tensor.numel() * tensor.element_size()) for index, tensor in ordered]
        self._on_device = _as_bytes([tensor for _, tensor in ordered])
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
        copies = {}
        start = 0
        for index, dtype, size in self._layout:
            copies[index] = self._on_host[start : start + size].view(dtype)
            start += size
        return copies


def _by_device(tensors: Sequence[Tensor]) -> list[list[int]]:
    groups: dict[torch.device, list[int]] = {}
    for index, tensor in enumerate(tensors):
        groups.setdefault(tensor.device, []).append(index)
    return list(groups.values())


def _as_bytes(tensors: Sequence[Tensor]) -> Tensor:
    """One buffer of bytes; tensors of a dtype are joined first, which takes fewer kernels."""
    parts: list[Tensor] = []
    run: list[Tensor] = []
    for position, tensor in enumerate(tensors):
        run.append(tensor.detach().reshape(-1))
        if position + 1 == len(tensors) or tensors[position + 1].dtype != tensor.dtype:
            parts.append(torch.cat(run).view(torch.uint8))
            run = []
    return torch.cat(parts)
