"""The statistics of all gradients on a GPU in two launches, each gradient read once: where Triton is installed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

_CHUNK = 2**16  # values a program reads: enough programs to fill a GPU, and a float32 sum that keeps its digits
_BLOCK = 2**11  # values that a program reads at once; divides a chunk
_JOINED = 2**10  # chunks that are brought together at once
_ALIGNED = 16  # bytes that a GPU loads at once, from a multiple of as many
_OPTIONS = {"enable_fp_fusion": True}  # its default: Triton 3.9 warns where it is not said

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def takes(tensor: Tensor) -> bool:
    """Tell whether :func:`fused_rows` measures this real, dense tensor: a plain one on a GPU, without gaps.

    A subclass may hold its values elsewhere, or not yet: one of an asynchronous collective is waited for by torch's own
    operators alone.
    """
    return (
        tensor.is_cuda
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.dtype in _DTYPES
        and without_gaps(tensor)
    )


def without_gaps(tensor: Tensor) -> bool:
    """Tell whether the values lie side by side in memory, in whatever order: a transposed matrix's do."""
    return tensor.is_contiguous() or (
        tensor.permute(sorted(range(tensor.dim()), key=tensor.stride, reverse=True)).is_contiguous()
    )


def fused_rows(tensors: Sequence[Tensor]) -> Tensor:
    """Measure tensors without gaps on one device in one dtype: rows ``[4]`` of ``gradient_statistics``.

    A table of addresses goes to the device, one kernel measures chunks of all tensors, and one brings the chunks of
    each together, always in the same order. Sums of squares are float32 within a chunk (float64 for float64 tensors)
    and float64 beyond; a squared norm beyond float32 is infinite. All of it is launched on the current stream. The
    first call for a dtype compiles, which takes about a second where Triton has not kept it on disk.

    On a CPU the kernels run in Triton's interpreter (``TRITON_INTERPRET=1``), for tests.

    Raises:
        Exception: whatever keeps Triton from running: it is not installed, finds no C compiler, does not know the GPU.
    """
    from triton.runtime import JITFunction

    from telemetry.measures import sweep_kernels  # here: it imports Triton

    measure_chunks: Any = sweep_kernels.measure_chunks
    join_chunks: Any = sweep_kernels.join_chunks
    device = tensors[0].device
    if device.type == "cuda" and not isinstance(measure_chunks, JITFunction):
        raise RuntimeError("TRITON_INTERPRET is set, and its interpreter takes an address of the GPU for the host's")
    table, chunks = _chunk_table(tensors)
    formats = sweep_kernels.FORMATS[tensors[0].dtype]
    with torch.cuda.device_of(tensors[0]):  # Triton launches on the current device
        found = torch.empty(chunks, 4, dtype=torch.float64, device=device)
        rows = torch.empty(len(tensors), 4, dtype=torch.float64, device=device)
        measure_chunks[(chunks,)](table, found, **formats, BLOCK=_BLOCK, num_warps=8, **_OPTIONS)
        join_chunks[(len(tensors),)](
            table[2 * chunks :], found, rows, WIDE=formats["WIDE"], BLOCK=_JOINED, num_warps=4, **_OPTIONS
        )
    return rows


def _chunk_table(tensors: Sequence[Tensor]) -> tuple[Tensor, int]:
    """Addresses and lengths of all chunks, then at which chunk each tensor starts and the last ends; how many chunks.

    What lies before a tensor's first aligned address is a chunk of its own, so that all long ones are aligned.
    """
    device, width = tensors[0].device, tensors[0].element_size()
    addresses = np.array([tensor.data_ptr() for tensor in tensors], dtype=np.int64)
    sizes = np.array([tensor.numel() for tensor in tensors], dtype=np.int64)
    heads = np.minimum(-addresses % _ALIGNED // width, sizes)
    starts = np.zeros(len(tensors) + 1, dtype=np.int64)
    np.cumsum((heads > 0) - (heads - sizes) // _CHUNK, out=starts[1:])
    chunks = int(starts[-1])
    owner = np.repeat(np.arange(len(tensors)), np.diff(starts))
    begins = heads[owner] + (np.arange(chunks) - starts[owner] - (heads > 0)[owner]) * _CHUNK
    ends = np.minimum(begins + _CHUNK, sizes[owner])
    begins = np.maximum(begins, 0)  # of a head
    # Pinned, so that the copy does not wait; torch keeps pinned memory from being used again until the copy has ended.
    host = torch.empty(2 * chunks + len(starts), dtype=torch.int64, pin_memory=device.type == "cuda")
    table = host.numpy()
    table[: 2 * chunks : 2] = addresses[owner] + begins * width
    table[1 : 2 * chunks : 2] = ends - begins
    table[2 * chunks :] = starts
    return host.to(device, non_blocking=True), chunks
