"""Triton kernels that take four statistics of many tensors and read each value once.

Both write rows of float64: squared norm, largest magnitude, zeros, non-finite values. Magnitudes and counts come from
the bits of a value, not from comparing floating-point numbers: as integers, magnitudes are ordered like the numbers, an
infinity above all finite ones and NaN above infinity, whatever a compiler assumes of NaN or a device does to the
smallest numbers.

The kernels run in Triton's interpreter in the tests. They compile for NVIDIA's compute capabilities 8.0 and 9.0 with
Triton 3.2 and 3.9, and with 3.9 for 10.0 and AMD's gfx942. They have not run on a GPU yet:
``tests/telemetry/test_on_a_gpu.py`` holds them to the plain way where there is one.
"""

# Triton's decorator has no types, and its constant arguments are upper case by custom.
# mypy: disable-error-code="no-untyped-def, untyped-decorator, arg-type"
# ruff: noqa: N803, SIM300

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

_SINGLE = {"WIDE": tl.float32, "BITS": tl.int32, "MAGNITUDE": 0x7FFF_FFFF, "INFINITY": 0x7F80_0000}
_DOUBLE = {"WIDE": tl.float64, "BITS": tl.int64, "MAGNITUDE": 0x7FFF_FFFF_FFFF_FFFF, "INFINITY": 0x7FF0_0000_0000_0000}
FORMATS: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {"VALUE": tl.float32, **_SINGLE},
    torch.bfloat16: {"VALUE": tl.int16, **_SINGLE},  # the upper half of a float32's bits
    torch.float16: {"VALUE": tl.float16, **_SINGLE},
    torch.float64: {"VALUE": tl.float64, **_DOUBLE},
}
"""Of each dtype: what is loaded, what it is computed in, and that one's bits."""


@triton.jit
def _take(values, squares, largest, zeros, broken, VALUE, WIDE, BITS, MAGNITUDE, INFINITY):
    """Add a block of values to what each lane has found so far."""
    wide = (values.to(tl.int32) << 16).to(WIDE, bitcast=True) if VALUE == tl.int16 else values.to(WIDE)
    magnitude = wide.to(BITS, bitcast=True) & MAGNITUDE
    squares += wide * wide
    largest = tl.maximum(largest, magnitude)
    zeros += (magnitude == 0).to(tl.int32)
    broken += (magnitude >= INFINITY).to(tl.int32)
    return squares, largest, zeros, broken


@triton.jit
def measure_chunks(
    table,
    found,
    VALUE: tl.constexpr,
    WIDE: tl.constexpr,
    BITS: tl.constexpr,
    MAGNITUDE: tl.constexpr,
    INFINITY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Measure one chunk a program: ``table`` holds the address and the length of each, ``found`` takes a row of each.

    A chunk of at least ``BLOCK`` values must begin at a multiple of 16 bytes, so that they are loaded 16 bytes at once.
    """
    chunk = tl.program_id(0).to(tl.int64)
    first = tl.load(table + 2 * chunk).to(tl.pointer_type(VALUE))
    length = tl.load(table + 2 * chunk + 1).to(tl.int32)
    lanes = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), WIDE)
    largest = tl.zeros((BLOCK,), BITS)
    zeros = tl.zeros((BLOCK,), tl.int32)
    broken = tl.zeros((BLOCK,), tl.int32)
    whole = length // BLOCK * BLOCK
    for start in range(0, whole, BLOCK):
        values = tl.load(tl.multiple_of(first + start, 16) + lanes)
        squares, largest, zeros, broken = _take(
            values, squares, largest, zeros, broken, VALUE, WIDE, BITS, MAGNITUDE, INFINITY
        )
    rest = length - whole
    values = tl.load(first + whole + lanes, mask=lanes < rest, other=0)
    squares, largest, zeros, broken = _take(
        values, squares, largest, zeros, broken, VALUE, WIDE, BITS, MAGNITUDE, INFINITY
    )
    row = found + 4 * chunk
    tl.store(row, tl.sum(squares, axis=0).to(tl.float64))
    tl.store(row + 1, tl.max(largest, axis=0).to(WIDE, bitcast=True).to(tl.float64))
    filling = BLOCK - rest  # zeros that fill the last block up
    tl.store(row + 2, (tl.sum(zeros, axis=0) - filling).to(tl.float64))
    tl.store(row + 3, tl.sum(broken, axis=0).to(tl.float64))


@triton.jit
def join_chunks(starts, found, rows, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Bring the chunks of one tensor a program together: ``starts`` holds where they start, and where the last end."""
    tensor = tl.program_id(0)
    end = tl.load(starts + tensor + 1)
    lanes = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), tl.float64)
    largest = tl.zeros((BLOCK,), tl.int64)
    zeros = tl.zeros((BLOCK,), tl.float64)
    broken = tl.zeros((BLOCK,), tl.float64)
    for start in range(tl.load(starts + tensor), end, BLOCK):
        row = found + 4 * (start + lanes)
        inside = start + lanes < end
        squares += tl.load(row, mask=inside, other=0.0)
        largest = tl.maximum(largest, tl.load(row + 1, mask=inside, other=0.0).to(tl.int64, bitcast=True))
        zeros += tl.load(row + 2, mask=inside, other=0.0)
        broken += tl.load(row + 3, mask=inside, other=0.0)
    row = rows + 4 * tensor
    tl.store(row, tl.sum(squares, axis=0).to(WIDE).to(tl.float64))  # infinite beyond what the norm is computed in
    tl.store(row + 1, tl.max(largest, axis=0).to(tl.float64, bitcast=True))
    tl.store(row + 2, tl.sum(zeros, axis=0))
    tl.store(row + 3, tl.sum(broken, axis=0))
