"""Reads the gradients of a model's parameters, each rank its own part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from telemetry.families.base import Family
from telemetry.probes.sharding import gradient_of, is_fsdp1, is_zero, is_zero3, own_part


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
    layers = family.layers() if family is not None else ()
    layer_of = {
        id(parameter): layer.index
        for layer in layers
        for module in (layer.attention, *(network.module for network in layer.feed_forward.values()))
        for parameter in module.parameters()
    }
    group_of = family.group_of if family is not None else lambda _name: "other"
    return [
        TrainedParameter(name, group_of(name), layer_of.get(id(parameter)), parameter)
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
