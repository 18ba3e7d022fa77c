"""Reads the gradients of a model's parameters, and how far the optimizer really moves them: each rank its own part."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from telemetry.families.base import Family
from telemetry.measures.gradients import squared_norms
from telemetry.probes.sharding import gradient_of, is_fsdp1, is_zero, is_zero3, own_part

SAMPLED = 2**16
"""The most values of a parameter that are compared evenly: all of a smaller one, spread ones of a larger one."""

COLUMNS_READ = 8
"""Columns of a gradient by which its largest rows are found."""


@dataclass(frozen=True)
class TrainedParameter:
    """A parameter that requires a gradient.

    Attributes:
        name: in the model.
        group: the catalogue's gradient group.
        layer: the decoder layer whose attention or feed-forward network it belongs to; None for any other.
        tensor: the parameter itself.
    """

    name: str
    group: str
    layer: int | None
    tensor: nn.Parameter

    @property
    def has_gradient(self) -> bool:
        """Whether the last backward passes have left it a gradient."""
        return gradient_of(self.tensor) is not None


def trained_parameters(model: nn.Module, family: Family | None) -> list[TrainedParameter]:
    """Every parameter that requires a gradient, tied ones once, in the model's order: the same on every rank."""
    family = family if family is not None else Family(model)  # which knows no layers and no groups
    layer_of = {
        id(parameter): layer.index
        for layer in family.layers()
        for module in (layer.attention, *(network.module for network in layer.feed_forward.values()))
        for parameter in module.parameters()
    }
    return [
        TrainedParameter(name, family.group_of(name), layer_of.get(id(parameter)), parameter)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    ]


def own_gradients(parameters: Sequence[TrainedParameter], is_main: bool) -> dict[int, Tensor]:
    """Index of a parameter → this rank's part of its gradient; parameters without any part are left out.

    Sums over the ranks' parts are sums over the whole: see :func:`own_part`.
    """
    found = {}
    for index, parameter in enumerate(parameters):
        gradient = gradient_of(parameter.tensor)
        part = None if gradient is None else own_part(gradient, is_main or is_zero3(parameter.tensor))
        if part is not None:
            found[index] = part
    return found


def out_of_reach(model: nn.Module) -> str | None:
    """Why the gradients and parameters of a wrapped model cannot be read part by part; None where they can."""
    if is_fsdp1(model):
        return "FSDP1 keeps parameters and gradients in flat shards that do not say whose they are: use FSDP2"
    return None


def steps_by_itself(parameters: Sequence[TrainedParameter]) -> bool:
    """Whether DeepSpeed's ZeRO holds the parameters: its optimizer has stepped before a callback could look."""
    return any(is_zero(one.tensor) for one in parameters)


class UpdateProbe:
    """Copies values before the optimizer steps, and compares them after it: at most 384 KiB a parameter, freed at once.

    Of a large parameter two samples are taken: the rows with the largest gradients, whole (of an embedding only the
    rows of the tokens that were there move), and evenly spread values, which stand for all other rows.

    Args:
        parameters: index → parameter, on the ranks and in the parts that are this rank's to count, their gradients
            still there.
        is_main: as in :func:`own_part`.
    """

    def __init__(self, parameters: Mapping[int, TrainedParameter], is_main: bool) -> None:
        self._parameters, self._is_main = parameters, is_main
        self._samples: list[_Sample] = []
        for index, parameter in parameters.items():
            part = own_part(parameter.tensor, is_main)
            if part is not None and part.numel():
                gradient = gradient_of(parameter.tensor)
                self._samples += _samples(index, part, None if gradient is None else own_part(gradient, is_main))
        self._before = self._read()

    def compare(self) -> tuple[list[tuple[int, float]], Tensor]:
        """After the optimizer's step. Launches device work only.

        Returns:
            Of each sample its parameter's index and how many values each of its values stands for; and float64
            ``[samples, 2]``: of its values the squared norm of the step, and of the weights before it. Steps are taken
            in float32 (float64 for float64 weights).
        """
        with torch.no_grad():
            steps = [after.sub_(before) for after, before in zip(self._read(), self._before, strict=True)]
            norms = [
                squared_norms(
                    [
                        values if one.scale is None else values * one.scale
                        for one, values in zip(self._samples, vectors, strict=True)
                    ]
                )
                for vectors in (steps, self._before)
            ]
        return [(one.index, one.weight) for one in self._samples], torch.stack(norms, dim=1)

    def _read(self) -> list[Tensor]:
        """The values of every sample, copied to float32 or wider: one copy a device and dtype."""
        views: dict[tuple[torch.device, torch.dtype], dict[int, Tensor]] = defaultdict(dict)
        parts = {one.index: own_part(self._parameters[one.index].tensor, self._is_main) for one in self._samples}
        for place, sample in enumerate(self._samples):
            part = parts[sample.index]
            assert part is not None  # it was there when the sample was taken
            view = sample.read(part)
            views[view.device, view.dtype][place] = view
        found: dict[int, Tensor] = {}
        for (_, dtype), held in views.items():
            joined = torch.cat(list(held.values())).to(torch.promote_types(dtype, torch.float32))
            found.update(zip(held, joined.split([view.numel() for view in held.values()]), strict=True))
        return [found[place] for place in range(len(self._samples))]


@dataclass(frozen=True)
class _Sample:
    """Values of a parameter that stand for a part of it.

    Attributes:
        index: the parameter's.
        read: parameter → the values, flat.
        weight: how many values of the parameter each stands for.
        scale: what each value is multiplied by before, float32 or wider; None for nothing.
    """

    index: int
    read: Callable[[Tensor], Tensor]
    weight: float = 1.0
    scale: Tensor | None = None


def _samples(index: int, part: Tensor, gradient: Tensor | None) -> list[_Sample]:
    """All of a small parameter; of a large one its rows with the largest gradients and an even sample of the others."""
    stride = _stride(part)
    if stride == 1 or part.dim() < 2 or gradient is None or gradient.shape != part.shape:
        return [_Sample(index, evenly_spread, part.numel() / len(range(0, part.numel(), stride)))]
    columns = part.shape[-1]
    rows = part.numel() // columns
    chosen = _rows_of_largest(gradient, min(rows, max(1, SAMPLED // 2 // columns)))
    other = torch.ones(rows, device=part.device).index_fill_(0, chosen, 0.0)
    other = other[torch.arange(0, part.numel(), stride, device=part.device) // columns]  # of each value of the sample
    stands_for = (rows - len(chosen)) * columns / other.sum().clamp(min=1)
    return [
        _Sample(index, lambda tensor: tensor.reshape(rows, columns)[chosen].reshape(-1)),
        _Sample(index, evenly_spread, scale=other * stands_for.sqrt()),
    ]


def _rows_of_largest(gradient: Tensor, count: int) -> Tensor:
    """Positions of the rows with the largest values in their first columns: a row that is passed by is all zeros."""
    if gradient.is_sparse:
        gradient = gradient.coalesce()
        sizes = gradient.values().new_zeros(gradient.shape[0])
        sizes[gradient.indices()[0]] = gradient.values()[:, :COLUMNS_READ].abs().amax(-1)
    else:
        sizes = gradient.reshape(-1, gradient.shape[-1])[:, :COLUMNS_READ].abs().amax(-1)
    return sizes.topk(count).indices


def _stride(tensor: Tensor) -> int:
    """The smallest stride that leaves at most :data:`SAMPLED` values and goes through the columns in turn."""
    columns = tensor.shape[-1] if tensor.dim() else 1
    stride = math.ceil(tensor.numel() / SAMPLED)
    while stride > 1 and math.gcd(stride, columns) > 1:
        stride += 1
    return stride


def evenly_spread(tensor: Tensor) -> Tensor:
    """At most :data:`SAMPLED` values of a tensor, flat."""
    return tensor.reshape(-1)[:: _stride(tensor)]
