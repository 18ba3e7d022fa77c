"""Reads the gradients of a model's parameters, each rank its own part."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from telemetry.families.base import Family


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
        return _gradient(self.tensor) is not None


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
        gradient = _gradient(parameter.tensor)
        part = None if gradient is None else own_part(gradient, is_main or _is_zero3(parameter.tensor))
        if part is not None:
            found[index] = part
    return found


def own_part(tensor: Tensor, is_main: bool) -> Tensor | None:
    """What a rank adds of a tensor to a sum over ranks that counts every value once.

    Of a sharded tensor (FSDP2's ``DTensor``) every rank has its own shard, as a plain local tensor; of a tensor that
    all ranks hold alike (DDP) rank 0 has the whole, and the others nothing: None.
    """
    mesh = getattr(tensor, "device_mesh", None)
    if mesh is None:
        return tensor.detach() if is_main else None
    placements = tensor.placements  # type: ignore[attr-defined]
    # Along a mesh dimension that repeats the shard, its first rank counts.
    first = all(place.is_shard() or mesh.get_local_rank(dim) == 0 for dim, place in enumerate(placements))
    return tensor.detach().to_local() if first else None  # type: ignore[attr-defined]


def out_of_reach(model: nn.Module) -> str | None:
    """Why the gradients and parameters of a wrapped model cannot be read part by part; None where they can."""
    if any(hasattr(module, "_fsdp_wrapped_module") for module in model.modules()):
        return "FSDP1 keeps parameters and gradients in flat shards that do not say whose they are: use FSDP2"
    return None


def steps_by_itself(parameters: Sequence[TrainedParameter]) -> bool:
    """Whether DeepSpeed's ZeRO holds the parameters: its optimizer has stepped before a callback could look."""
    return any(_is_zero3(one.tensor) or hasattr(one.tensor, "_hp_mapping") for one in parameters)


def _gradient(parameter: nn.Parameter) -> Tensor | None:
    if parameter.grad is not None or not _is_zero3(parameter):
        return parameter.grad
    from deepspeed.utils import safe_get_local_grad

    gradient: Tensor | None = safe_get_local_grad(parameter)  # this rank's shard, nothing gathered
    return gradient


def _is_zero3(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id")
