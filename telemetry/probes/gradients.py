"""Reads the gradients of a model's parameters, by group."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from telemetry.families.base import Family


def gradients_by_group(model: nn.Module, family: Family, is_main: bool = True) -> dict[str, list[Tensor]]:
    """Group → this rank's part of the gradients of its parameters. Groups without any part are left out.

    Sums over the ranks' parts are sums over the whole: of a sharded gradient (FSDP2's ``DTensor``) every rank has its
    own shard, as a plain local tensor; one that all ranks hold alike (DDP) is rank 0's.
    """
    groups: dict[str, list[Tensor]] = {}
    for name, gradient in _named_gradients(model):
        part = _own_part(gradient, is_main)
        if part is not None:
            groups.setdefault(family.group_of(name), []).append(part)
    return groups


def _own_part(gradient: Tensor, is_main: bool) -> Tensor | None:
    mesh = getattr(gradient, "device_mesh", None)
    if mesh is None:
        return gradient if is_main else None
    placements = gradient.placements  # type: ignore[attr-defined]
    # Along a mesh dimension that repeats the shard, its first rank counts.
    first = all(place.is_shard() or mesh.get_local_rank(dim) == 0 for dim, place in enumerate(placements))
    return gradient.to_local() if first else None  # type: ignore[attr-defined]


def _named_gradients(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            yield name, parameter.grad.detach()
