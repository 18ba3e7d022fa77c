"""Reads the gradients of a model's parameters, and how far the optimizer really moves them: each rank its own part."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from telemetry.families.base import Family
from telemetry.measures.gradients import squared_norms
from telemetry.probes.sharding import gradient_of, is_fsdp1, is_zero, is_zero3, own_part

SAMPLED = 2**16
"""The most values of a parameter that are compared: all of a smaller one, evenly spread ones of a larger one."""


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
    """Copies values before the optimizer steps, and compares them after it: at most 256 KiB a parameter, freed at once.

    Args:
        parameters: index → parameter, on the ranks and in the parts that are this rank's to count.
        is_main: as in :func:`own_part`.
    """

    def __init__(self, parameters: Mapping[int, TrainedParameter], is_main: bool) -> None:
        self._parameters = parameters
        self._is_main = is_main
        self._values = self._sampled()

    def compare(self) -> tuple[dict[int, float], Tensor]:
        """After the optimizer's step. Launches device work only.

        Returns:
            By index, in order, how many values each compared value stands for; and float64 ``[parameters, 2]``: of the
            compared values the squared norm of the step, and of the weights before it. Steps are taken in float32
            (float64 for float64 weights).
        """
        with torch.no_grad():
            after = self._sampled()
            steps = {index: after[index][0].sub_(before) for index, (before, _) in self._values.items()}
            norms = [
                squared_norms(vectors) for vectors in (list(steps.values()), [one for one, _ in self._values.values()])
            ]
        return {index: weight for index, (_, weight) in self._values.items()}, torch.stack(norms, dim=1)

    def _sampled(self) -> dict[int, tuple[Tensor, float]]:
        """By index: values copied to float32 or wider, and how many of the parameter each stands for."""
        views: dict[tuple[torch.device, torch.dtype], dict[int, Tensor]] = defaultdict(dict)
        weights: dict[int, float] = {}
        for index, parameter in self._parameters.items():
            part = own_part(parameter.tensor, self._is_main)
            if part is not None and part.numel():
                view = evenly_spread(part)
                views[part.device, part.dtype][index] = view
                weights[index] = part.numel() / view.numel()
        found: dict[int, Tensor] = {}
        for (_, dtype), held in views.items():
            joined = torch.cat(list(held.values())).to(torch.promote_types(dtype, torch.float32))
            found.update(zip(held, joined.split([view.numel() for view in held.values()]), strict=True))
        return {index: (found[index], weights[index]) for index in weights}


def evenly_spread(tensor: Tensor) -> Tensor:
    """At most :data:`SAMPLED` values of a tensor, flat, at a stride that goes through its columns in turn."""
    flat = tensor.reshape(-1)
    columns = tensor.shape[-1] if tensor.dim() else 1
    stride = math.ceil(flat.numel() / SAMPLED)
    while stride > 1 and math.gcd(stride, columns) > 1:
        stride += 1
    return flat[::stride]
