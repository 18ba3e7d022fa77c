from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from telemetry.measures.gradients import squared_norms

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64)


def reference(tensor: Tensor) -> float:
    return math.fsum(abs(x) ** 2 for x in tensor.flatten().tolist())


@st.composite
def gradients(draw: st.DrawFn) -> Tensor:
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    size = math.prod(shape)
    values = draw(st.lists(st.floats(-50, 50), min_size=size, max_size=size))
    return torch.tensor(values, dtype=torch.float64).to(draw(st.sampled_from(DTYPES))).reshape(shape)


@given(st.lists(gradients(), max_size=6))
def test_equals_the_definition(tensors: list[Tensor]) -> None:
    squares = squared_norms(tensors)
    assert squares.dtype == torch.float64
    assert squares.shape == (len(tensors),)
    assert squares.tolist() == pytest.approx([reference(tensor) for tensor in tensors], rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_large_gradients_keep_their_digits(dtype: torch.dtype, scale: float) -> None:
    """A plain float32 sum over as many values is off by 1e-4, a bfloat16 norm by 1e-3."""
    generator = torch.Generator().manual_seed(0)
    tensor = (torch.randn(1200, 1200, generator=generator) * scale).to(dtype)
    exact = float(tensor.double().square().sum())
    for view in (tensor, tensor.t(), tensor[::2]):
        share = float(view.double().square().sum()) / exact
        assert float(squared_norms([view])[0]) == pytest.approx(exact * share, rel=2e-5)


def test_equals_the_norm_that_clipping_takes() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((30, 20), (7,), ())]
    for number, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, number + 0.5)
    squares = squared_norms([parameter.grad for parameter in parameters if parameter.grad is not None])
    clipped = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    assert float(squares.sum().sqrt()) == pytest.approx(float(clipped), rel=1e-6)


def test_infinities_and_nans_show() -> None:
    squares = squared_norms([torch.tensor([1.0, math.nan]), torch.tensor([math.inf]), torch.tensor([2.0])])
    assert math.isnan(squares[0])
    assert squares[1:].tolist() == pytest.approx([math.inf, 4.0])


def test_a_sparse_gradient_is_its_coalesced_values() -> None:
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    embedding(torch.tensor([1, 1, 4])).sum().backward()
    gradient = embedding.weight.grad
    assert gradient is not None
    assert gradient.is_sparse
    assert not gradient.is_coalesced()
    assert squared_norms([gradient]).item() == pytest.approx(3 * (2**2 + 1))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_compressed_rows_are_their_values() -> None:
    dense = torch.tensor([[0.0, 3.0], [4.0, 0.0]])
    assert squared_norms([dense.to_sparse_csr()]).item() == pytest.approx(25)


@pytest.fixture
def two_ranks() -> Iterator[None]:
    """This process as rank 0 of 2, with a second one that is only pretended."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("two_ranks")
def test_of_a_distributed_tensor_the_local_shard_counts() -> None:
    mesh = init_device_mesh("cpu", (2,))
    shard = DTensor.from_local(torch.full((2, 3), 2.0), mesh, [Shard(0)], run_check=False)
    assert shard.shape == (4, 3)
    squares = squared_norms([shard, torch.ones(5)])
    assert type(squares) is Tensor
    assert squares.tolist() == pytest.approx([24, 5])


def test_waits_for_nothing(watched: Callable[..., Any]) -> None:
    tensors = [torch.ones(3, 4), torch.ones(2, dtype=torch.bfloat16), torch.ones(()), torch.zeros(0)]
    squares, _ = watched(lambda *given: squared_norms(given), *tensors)
    assert squares.tolist() == pytest.approx([12, 2, 1, 0])


def test_reads_no_value() -> None:
    """A meta tensor has none to read."""
    assert squared_norms([torch.empty(3, device="meta"), torch.empty(2, 2, device="meta")]).shape == (2,)


def test_autocast_and_gradients_are_kept_out() -> None:
    tensor = torch.linspace(-1, 1, 1000).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = squared_norms([tensor])
    assert torch.equal(inside, squared_norms([tensor]))
    assert not inside.requires_grad
