"""Reads the gradients of a model's parameters, and how far the optimizer really moves them: each rank its own part."""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from telemetry.families.base import Family
from telemetry.measures.gradients import squared_norms_of_parts
from telemetry.probes.sharding import (
    gradient_of,
    is_distributed,
    is_elsewhere,
    is_fsdp1,
    is_split_unsaid,
    is_unsummed,
    is_zero,
    own_part,
    own_value,
    split_as,
)

WHOLE = 2**15
"""The most values of a parameter of which all are compared."""

SAMPLED = 2**13
"""The most values of a larger one that are compared evenly: each is a line of memory of its own to fetch."""

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
        """Whether the last backward passes have left it a gradient, as far as this rank can tell."""
        return gradient_of(self.tensor) is not None or is_elsewhere(self.tensor)


_places: weakref.WeakKeyDictionary[Family, dict[str, tuple[str, int | None]]] = weakref.WeakKeyDictionary()
"""Family → name of a parameter → its group and layer, as long as no name is new."""


def trained_parameters(model: nn.Module, family: Family | None) -> list[TrainedParameter]:
    """Every parameter that requires a gradient, tied ones once, in the model's order: the same on every rank."""
    family = family if family is not None else Family(model)  # which knows no layers and no groups
    found = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    known = _places.setdefault(family, {})
    if not all(name in known for name, _ in found):
        layer_of = {
            id(parameter): layer.index
            for layer in family.layers()
            for module in (layer.attention, *(network.module for network in layer.feed_forward.values()))
            for parameter in module.parameters()
        }
        known.update({name: (family.group_of(name), layer_of.get(id(parameter))) for name, parameter in found})
    return [TrainedParameter(name, *known[name], parameter) for name, parameter in found]


def own_gradients(parameters: Sequence[TrainedParameter], is_main: bool) -> dict[int, Tensor]:
    """Index of a parameter → this rank's part of its gradient; parameters without any part are left out.

    Sums over the ranks' parts are sums over the whole: see :func:`own_part`.
    """
    found = {}
    for index, parameter in enumerate(parameters):
        gradient = gradient_of(parameter.tensor)
        part = None if gradient is None else own_part(gradient, is_main or is_zero(parameter.tensor))
        if part is not None:
            found[index] = part
    return found


def out_of_reach(model: nn.Module) -> str | None:
    """Why the gradients and parameters of a wrapped model cannot be read part by part; None where they can."""
    if is_fsdp1(model):
        return "FSDP1 keeps parameters and gradients in flat shards that do not say whose they are: use FSDP2"
    for name, parameter in model.named_parameters() if is_distributed() else ():
        if is_split_unsaid(parameter):
            return "Megatron or DeepSpeed (AutoTP) may have split layers over ranks, and parameters do not say how"
        if parameter.grad is not None and is_unsummed(parameter.grad):
            return f"that of {name} is not added up over ranks before the optimizer steps"
    return None


def steps_by_itself(parameters: Sequence[TrainedParameter]) -> bool:
    """Whether DeepSpeed's ZeRO holds the parameters, whose gradients are gone when its optimizer has stepped."""
    return any(is_zero(one.tensor) for one in parameters)


class UpdateProbe:
    """Copies values before the optimizer steps, and compares them after it: at most 128 KiB a parameter, freed at once.

    Of a large parameter two samples are taken: the rows with the largest gradients, whole (of an embedding only the
    rows of the tokens that were there move), and evenly spread values, which stand for all other rows.

    Args:
        parameters: index → parameter, on the ranks and in the parts that are this rank's to count, their gradients
            still there.
        is_main: as in :func:`own_part`.
    """

    def __init__(self, parameters: Mapping[int, TrainedParameter], is_main: bool) -> None:
        self._parameters, self._is_main = parameters, is_main
        samples: list[_Sample] = []
        parts = self._parts(parameters)
        for index, part in parts.items():
            samples += [_Sample(index, _whole)] if part.numel() <= WHOLE else self._of_large(index, part)
        self._groups = _read(samples, parts)

    def compare(self) -> tuple[list[tuple[int, float]], Tensor]:
        """After the optimizer's step, once. Launches device work only.

        Returns:
            Of each sample its parameter's index and how many values each of its values stands for; and float64
            ``[samples, 2]``: of its values the squared norm of the step, and of the weights before it. Steps are taken
            in float32 (float64 for float64 weights).
        """
        groups, self._groups = self._groups, []
        samples = [sample for group in groups for sample in group.samples]
        after = _read(samples, self._parts({sample.index for sample in samples}))
        norms = []
        with torch.no_grad():
            for old, new in zip(groups, after, strict=True):
                moved = (new.values.sub_(old.values), old.values)
                for values in moved:
                    old.scale(values)
                norms.append(torch.stack([squared_norms_of_parts(values, old.sizes) for values in moved], dim=1))
        first = norms[0].device if norms else torch.device("cpu")
        joined = [one.to(first, non_blocking=True) for one in norms]
        return [(one.index, one.weight) for one in samples], torch.cat(joined) if joined else torch.zeros(0, 2)

    def _parts(self, indices: Iterable[int]) -> dict[int, Tensor]:
        """Index → this rank's part of the parameter, where it has any."""
        parts = {index: own_value(self._parameters[index].tensor, self._is_main) for index in indices}
        return {index: part for index, part in parts.items() if part is not None and part.numel()}

    def _of_large(self, index: int, part: Tensor) -> list[_Sample]:
        parameter = self._parameters[index].tensor
        gradient = gradient_of(parameter)
        own = None if gradient is None else own_part(split_as(gradient, parameter), self._is_main)
        return _samples(index, part, own)


def _read(samples: Sequence[_Sample], parts: Mapping[int, Tensor]) -> list[_Values]:
    """The values of samples, copied to float32 or wider: one copy a device and dtype."""
    views: dict[tuple[torch.device, torch.dtype], list[tuple[_Sample, Tensor]]] = defaultdict(list)
    for sample in samples:
        view = sample.read(parts[sample.index])
        views[view.device, view.dtype].append((sample, view))
    return [
        _Values(
            [sample for sample, _ in held],
            [view.numel() for _, view in held],
            torch.cat([view for _, view in held]).to(torch.promote_types(dtype, torch.float32)),
        )
        for (_, dtype), held in views.items()
    ]


@dataclass(frozen=True)
class _Values:
    """Copies of samples on one device in one dtype, one after the other, as long as ``sizes`` says."""

    samples: list[_Sample]
    sizes: list[int]
    values: Tensor

    def scale(self, values: Tensor) -> None:
        """Multiply what belongs to a sample by its scale, in place."""
        if any(sample.scale is not None for sample in self.samples):
            for sample, part in zip(self.samples, values.split(self.sizes), strict=True):
                if sample.scale is not None:
                    part.mul_(sample.scale)


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
    """The rows of a large parameter with the largest gradients, and an even sample of the others."""
    stride = _stride(part)
    if part.dim() < 2 or gradient is None or gradient.shape != part.shape:
        return [_Sample(index, evenly_spread, part.numel() / len(range(0, part.numel(), stride)))]
    columns = part.shape[-1]
    rows = part.numel() // columns
    chosen = _rows_of_largest(gradient, min(rows, max(1, WHOLE // 2 // columns)))
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


def _whole(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1)


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
