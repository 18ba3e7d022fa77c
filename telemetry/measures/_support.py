"""What the measures share: the context they run in, and pieces small enough to compute on without a full copy."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch
from torch import Tensor

_CPU_ELEMENTS = 2**18  # 1 MiB of float32: the passes over a piece stay in the processor's cache
_DEVICE_ELEMENTS = 2**22  # 16 MiB of float32: large enough that launching the kernels costs nothing


_NOTHING = nullcontext()


def undisturbed(device: torch.device) -> AbstractContextManager[None]:
    """No gradients and no autocast: inside an autocast region sums and softmaxes would change their dtype."""
    autocast = torch.amp.autocast_mode.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
    if not autocast and not torch.is_grad_enabled():  # the common case, inside of another measure or a hook
        return _NOTHING
    return _undisturbed(device.type if autocast else None)


@contextmanager
def _undisturbed(autocast: str | None) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if autocast is not None:
            stack.enter_context(torch.autocast(autocast, enabled=False))
        yield


def sum_dtype(device: torch.device) -> torch.dtype:
    """The dtype of sums: float64, or float32 on Apple's GPUs, which have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def piece_elements(device: torch.device) -> int:
    """The most elements of a piece that a measure makes copies of on ``device``."""
    return _CPU_ELEMENTS if device.type == "cpu" else _DEVICE_ELEMENTS


def row_pieces(tensor: Tensor, limit: int) -> Iterator[Tensor]:
    """Cuts ``tensor`` ``[..., columns]`` into ``[rows, columns]``, in order, with at most ``limit`` elements each.

    A piece is a view where the strides allow it and otherwise a copy of that piece alone; a single row is never cut.
    A tensor without elements has no pieces.
    """
    if tensor.dim() == 1:
        tensor = tensor.unsqueeze(0)
    if tensor.numel() == 0:
        return
    columns = tensor.shape[-1]
    if tensor.numel() <= limit:  # the common case, on the training thread
        yield tensor.reshape(-1, columns)
        return
    elements = tensor.numel() // tensor.shape[0]
    if elements > limit and tensor.dim() > 2:
        for part in tensor.unbind():
            yield from row_pieces(part, limit)
    else:
        for part in tensor.split(max(1, limit // elements)):
            yield part.reshape(-1, columns)


def value_pieces(tensor: Tensor, limit: int) -> Iterator[Tensor]:
    """Cuts a tensor of any shape into flat pieces ``[values]``, in order, with at most ``limit`` elements each."""
    if 0 < tensor.numel() <= limit:
        yield tensor.reshape(-1)
        return
    for piece in row_pieces(tensor.unsqueeze(-1), limit):
        yield piece.squeeze(-1)
