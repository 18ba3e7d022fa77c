"""Reads the gradients of a model's parameters, by group."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from telemetry.families.base import Family


def gradients_by_group(model: nn.Module, family: Family) -> dict[str, list[Tensor]]:
    """Group → the gradients of its parameters. Groups without any gradient are left out."""
    groups: dict[str, list[Tensor]] = {}
    for name, gradient in _named_gradients(model):
        groups.setdefault(family.group_of(name), []).append(gradient)
    return groups


def _named_gradients(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            yield name, parameter.grad.detach()
