"""How far an optimizer moved the weights: exactly where they are few, by even samples where they are many."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import nn

from telemetry.probes.gradients import SAMPLED, TrainedParameter, UpdateProbe, evenly_spread


def trained(*parameters: nn.Parameter) -> dict[int, TrainedParameter]:
    return {index: TrainedParameter(str(index), "other", None, one) for index, one in enumerate(parameters)}


def norms_of(probe: UpdateProbe) -> Mapping[int, tuple[float, float]]:
    """Index → norm of the step and of the weights before it."""
    weights, norms = probe.compare()
    squares: dict[int, tuple[float, float]] = {}
    for (index, weight), (step, before) in zip(weights, norms.tolist(), strict=True):
        steps, weights_before = squares.get(index, (0.0, 0.0))
        squares[index] = (steps + step * weight, weights_before + before * weight)
    return {index: (math.sqrt(step), math.sqrt(before)) for index, (step, before) in squares.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_small_parameters_are_compared_whole(dtype: torch.dtype) -> None:
    parameters = [nn.Parameter(torch.full((2, 3), 2.0, dtype=dtype)), nn.Parameter(torch.ones((), dtype=dtype))]
    probe = UpdateProbe(trained(*parameters), is_main=True)
    with torch.no_grad():
        parameters[0].add_(0.5)
    norms = norms_of(probe)
    assert norms[0] == pytest.approx((math.sqrt(6) * 0.5, math.sqrt(6) * 2))
    assert norms[1] == (0, 1)


def test_a_step_that_the_dtype_cannot_hold_is_no_step() -> None:
    parameter = nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    probe = UpdateProbe(trained(parameter), is_main=True)
    with torch.no_grad():
        parameter.add_(1e-4)
    assert norms_of(probe)[0] == (0, 2)


def test_large_parameters_are_estimated_with_bounded_memory() -> None:
    generator = torch.Generator().manual_seed(0)
    parameter = nn.Parameter(torch.randn(512, 1024, generator=generator))
    step = torch.randn(512, 1024, generator=generator) * torch.linspace(0, 1, 1024)  # columns differ
    expected = (float(step.norm()), float(parameter.detach().norm()))
    probe = UpdateProbe(trained(parameter), is_main=True)
    assert sum(tensor.untyped_storage().nbytes() for tensor in (group.values for group in probe._groups)) <= 4 * SAMPLED
    with torch.no_grad():
        parameter.add_(step)
    assert norms_of(probe)[0] == pytest.approx(expected, rel=0.02)


def embedding(rows: int, dtype: torch.dtype = torch.float32, sparse: bool = False) -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(rows, 64, sparse=sparse, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("tokens", [[1_234], list(range(0, 40_000, 13))], ids=["one token", "more than are sampled"])
def test_rows_of_an_embedding_that_moved_are_seen_though_few(
    dtype: torch.dtype, sparse: bool, tokens: list[int]
) -> None:
    table = embedding(40_000, dtype, sparse)
    table(torch.tensor(tokens)).square().sum().backward()
    before = table.weight.detach().clone()
    probe = UpdateProbe(trained(table.weight), is_main=True)
    torch.optim.SGD([table.weight], lr=0.1).step()
    moved = (table.weight.detach().double() - before.double()).norm()
    found = norms_of(probe)[0]
    assert float(moved) > 0
    assert found == pytest.approx((float(moved), float(before.double().norm())), rel=0.05)


def test_rows_without_a_gradient_that_move_are_counted_too() -> None:
    """By weight decay, or by the momentum of earlier steps."""
    table = embedding(40_000)
    table(torch.tensor([7])).sum().backward()
    before = table.weight.detach().clone()
    probe = UpdateProbe(trained(table.weight), is_main=True)
    torch.optim.AdamW([table.weight], lr=0.1, weight_decay=0.5).step()
    moved = float((table.weight.detach() - before).norm())
    assert norms_of(probe)[0] == pytest.approx((moved, float(before.norm())), rel=0.02)


@pytest.mark.parametrize("shape", [(SAMPLED,), (3, SAMPLED), (1024, 300), (SAMPLED * 2, 2), (7, 11, 4096)])
def test_samples_are_few_and_go_through_every_column(shape: tuple[int, ...]) -> None:
    positions = torch.arange(math.prod(shape)).view(shape)
    sample = evenly_spread(positions)
    assert sample.numel() <= SAMPLED
    assert sample.numel() >= SAMPLED // 2
    assert int(sample[-1]) >= positions.numel() - 2 * positions.numel() / SAMPLED - 8
    columns = shape[-1]
    assert len((sample % columns).unique()) == min(columns, sample.numel())


def test_on_other_ranks_a_copied_parameter_is_not_compared() -> None:
    weights, norms = UpdateProbe(trained(nn.Parameter(torch.ones(2))), is_main=False).compare()
    assert weights == []
    assert norms.shape == (0, 2)


def test_an_empty_parameter_has_nothing_to_compare() -> None:
    assert norms_of(UpdateProbe(trained(nn.Parameter(torch.ones(0))), is_main=True)) == {}
