"""The fused sweep: its table of chunks anywhere, its kernels where Triton is installed, what replaces it without."""

from __future__ import annotations

import logging
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import programs

from telemetry.measures import fused_gradients, gradients
from telemetry.once import Once

TRITON = "3.9"  # the interpreter of an older one does not go with today's NumPy
PROGRAM = Path(__file__).with_name("interpreted_sweep.py")
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])


@settings(max_examples=50)
@given(dtype=DTYPES, cuts=st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), min_size=1, max_size=5))
def test_chunks_cover_each_tensor_once_and_long_ones_are_aligned(
    dtype: torch.dtype, cuts: list[tuple[int, int]]
) -> None:
    whole = torch.zeros(100, dtype=dtype)
    tensors = [whole[min(cut) : max(cut)] for cut in cuts]
    with mock.patch.object(fused_gradients, "_CHUNK", 16):
        table, chunks = fused_gradients._chunk_table(tensors)
    pairs, starts = table[: 2 * chunks].view(-1, 2).tolist(), table[2 * chunks :].tolist()
    assert starts[0] == 0
    assert starts[-1] == chunks
    for tensor, start, end in zip(tensors, starts, starts[1:], strict=False):
        address = tensor.data_ptr()
        for begins, length in pairs[start:end]:
            assert begins == address
            assert 0 < length <= 16
            assert begins % 16 == 0 or length * dtype.itemsize < 16
            address += length * dtype.itemsize
        assert address == tensor.data_ptr() + tensor.nbytes


def test_gaps_are_seen_whatever_the_order_of_the_values() -> None:
    whole = torch.zeros(4, 6, 2)
    for one in (whole, whole.permute(2, 0, 1), whole[0], torch.zeros(3, 1).t(), torch.zeros(())):
        assert fused_gradients.without_gaps(one)
    for one in (whole[:, 1:], whole[..., 0], torch.zeros(3, 1).expand(3, 2), whole.permute(2, 0, 1)[:1]):
        assert not fused_gradients.without_gaps(one)


def test_other_kernels_measure_where_the_sweep_fails(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As it does for a CPU's tensors, without Triton and with it. What it lacks it lacks at the next step too."""
    attempts = mock.Mock(wraps=fused_gradients.fused_rows)
    monkeypatch.setattr(fused_gradients, "fused_rows", attempts)
    monkeypatch.setattr(gradients, "_unfused", set())
    monkeypatch.setattr(gradients, "_once", Once(gradients.logger))
    tensors = [torch.linspace(-1, 1, 9), torch.zeros(2, 2)]
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            assert torch.equal(gradients._fused_rows(tensors), gradients.device_rows(tensors))
        gradients._fused_rows([tensor.double() for tensor in tensors])
    assert attempts.call_count == 2, "once for each dtype"
    assert len(caplog.records) == 1


def test_the_kernels_are_as_defined_in_the_interpreter(tmp_path: Path) -> None:
    triton = pytest.importorskip("triton", minversion=TRITON)
    found_in = str(Path(triton.__file__).parents[1])
    ended = programs.run([str(PROGRAM)], tmp_path, fresh=True, TRITON_INTERPRET="1", PYTHONPATH=found_in)
    assert ended.status == 0, ended.said
    assert "as defined" in ended.said


def test_the_kernels_compile_for_a_gpu_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton", minversion=TRITON)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from telemetry.measures import sweep_kernels

    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    for formats in sweep_kernels.FORMATS.values():
        constants = {**formats, "BLOCK": fused_gradients._BLOCK}
        signature = {"table": "*i64", "found": "*fp64", **dict.fromkeys(constants, "constexpr")}
        source = triton.compiler.ASTSource(sweep_kernels.measure_chunks, signature, constants)
        code = triton.compile(source, target=target, options={"num_warps": 8, **fused_gradients._OPTIONS}).asm
        assert code["cubin"]
        assert "ld.global.v" in code["ptx"], "16 bytes are not loaded at once"
        constants = {"WIDE": formats["WIDE"], "BLOCK": fused_gradients._JOINED}
        signature = {"starts": "*i64", "found": "*fp64", "rows": "*fp64", **dict.fromkeys(constants, "constexpr")}
        source = triton.compiler.ASTSource(sweep_kernels.join_chunks, signature, constants)
        assert triton.compile(source, target=target, options={"num_warps": 4, **fused_gradients._OPTIONS}).asm["cubin"]
