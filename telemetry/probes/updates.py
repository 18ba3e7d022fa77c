"""Sees how far the optimizer really moves the weights, whatever optimizer it is."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor

from telemetry.measures.gradients import squared_norms
from telemetry.probes.gradients import TrainedParameter
from telemetry.probes.sharding import own_part

SAMPLED = 2**16
"""The most values of a parameter that are compared: all of a smaller one, evenly spread ones of a larger one."""


class UpdateProbe:
    """Copies values before the optimizer steps, and compares them after it: at most 256 KiB a parameter, freed at once.

    Args:
        parameters: index → parameter, on the ranks and in the parts that are this rank's to count.
        is_main: as in :func:`telemetry.probes.sharding.own_part`.
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
