"""Feed-forward networks: are the one for text and the one for audio alive?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from telemetry.delivery.recorder import Emitter
from telemetry.families.base import Layer
from telemetry.instruments.base import Instrument, Step
from telemetry.instruments.probed_layers import probed_layers
from telemetry.measures.activations import ActivationTotals, activation_totals, counted_squares, served_rows
from telemetry.probes.activations import Role, watch_networks
from telemetry.probes.forward import Microbatch
from telemetry.records import Max, Mean, NormRatio, Sum

NOT_RUN = "it did not run, or gave no tensor"
NO_RESIDUAL = "the layer does not show the residual stream that it is added to"

_Network = tuple[int, str]


class ActivationInstrument(Instrument):
    """Everything under ``activations/``, over the positions that each network really serves.

    Args:
        layers: indices of the layers to look into; by default the first, the middle and the last.
    """

    def __init__(self, layers: Sequence[int] | None = None) -> None:
        self._layers = layers
        self._watched: Sequence[Layer] = ()
        self._served: Mapping[str, Tensor] = {}
        self._real: Tensor | None = None
        self._rows: dict[tuple[str, int], Tensor] = {}
        self._totals: dict[_Network, ActivationTotals] = {}
        self._squares: dict[tuple[_Network, Role], Tensor] = {}

    def begin(self, step: Step) -> None:
        """A due step begins: watch the networks."""
        self._forget()
        self._watched = probed_layers(step, self._layers, "activations")
        watch_networks(step.watch, self, self._watched, self._observe)

    def inputs(self, step: Step, microbatch: Microbatch) -> None:
        """The model is about to run: note which positions each network serves."""
        self._forget_batch()
        if step.family is None or microbatch.view is None:
            return
        self._served = step.family.served(microbatch.view)
        self._real = microbatch.view.real

    def finish(self, step: Step) -> None:
        """The due step has ended: hand over what was measured."""
        for layer in self._watched:
            for name, network in layer.feed_forward.items():
                if (layer.index, name) not in self._totals:
                    step.recorder.absent(_prefix((layer.index, name)), NOT_RUN)
                elif network.residual is None:
                    step.recorder.absent(f"{_prefix((layer.index, name))}/residual_share", NO_RESIDUAL)
        if self._totals:
            step.recorder.defer(_packed(self._totals, self._squares), _add_metrics)
        self._forget()

    def _observe(self, layer: int, name: str, role: Role, tensor: Tensor) -> None:
        if self._real is not None and name in self._served:
            self._measure((layer, name), role, tensor)

    def _measure(self, network: _Network, role: Role, tensor: Tensor) -> None:
        rows, counts = self._counted(network[1], tensor)
        if role == "output":
            totals = activation_totals(rows, counts)
            held = self._totals.get(network)
            self._totals[network] = totals if held is None else held.merge(totals)
        else:
            squares = counted_squares(rows, counts)
            self._squares[network, role] = self._squares.get((network, role), torch.zeros_like(squares)) + squares

    def _counted(self, name: str, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """A network's values as ``[rows, hidden]``, and which rows are real positions that it serves."""
        assert self._real is not None  # asked by the caller
        rows = tensor.detach().reshape(-1, tensor.shape[-1])
        if tensor.dim() == 3:  # of the whole batch
            return rows, (self._served[name] & self._real).reshape(-1)
        key = (name, rows.shape[0])
        if key not in self._rows:
            self._rows[key] = served_rows(self._served[name], self._real, rows.shape[0])
        return rows, self._rows[key]

    def _forget(self) -> None:
        self._watched = ()
        self._totals.clear()
        self._squares.clear()
        self._forget_batch()

    def _forget_batch(self) -> None:
        self._served = {}
        self._real = None
        self._rows.clear()


def _prefix(network: _Network) -> str:
    return f"activations/layer_{network[0]}/{network[1]}"


def _packed(
    totals: Mapping[_Network, ActivationTotals], squares: Mapping[tuple[_Network, Role], Tensor]
) -> dict[str, Tensor]:
    """Prefix of tags → totals, and the squares of what is added and of the residual stream where both are known."""
    packed = {}
    for network, values in totals.items():
        both = [squares[network, role] for role in ("added", "residual") if (network, role) in squares]
        packed[_prefix(network)] = torch.cat([values.packed(), *(square[None] for square in both if len(both) == 2)])
    return packed


def _add_metrics(host: Mapping[str, Tensor], emit: Emitter) -> None:
    for prefix, vector in host.items():
        packed, squares = vector[:5], vector[5:]
        totals = ActivationTotals.unpacked(packed)
        emit.metric(f"{prefix}/rms", NormRatio(totals.squares, totals.values))
        emit.metric(f"{prefix}/absmax", Max(totals.absmax))
        emit.metric(f"{prefix}/zero_fraction", Mean(totals.zeros, totals.values))
        if totals.values:
            emit.metric(f"{prefix}/nonfinite", Sum(totals.nonfinite))
        if len(squares):
            emit.metric(f"{prefix}/residual_share", NormRatio(*squares))
