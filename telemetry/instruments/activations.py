"""Feed-forward networks: are the one for text and the one for audio alive?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from telemetry.delivery.recorder import Emitter
from telemetry.families.base import Layer
from telemetry.instruments.probed_layers import probed_layers
from telemetry.measures.activations import ActivationTotals, activation_totals, counted_squares, served_rows
from telemetry.probes.activations import ActivationProbe, Role
from telemetry.probes.forward import Microbatch
from telemetry.records import Max, Mean, NormRatio, Sum
from telemetry.session import Session

NOT_RUN = "it did not run, or gave no tensor"
NO_RESIDUAL = "the layer does not show the residual stream that it is added to"

_Network = tuple[int, str]


class ActivationLog:
    """Everything under ``activations/``, over the positions that each network really serves. Part of a callback.

    Args:
        layers: indices of the layers to look into; by default the first, the middle and the last.
    """

    def __init__(self, layers: Sequence[int] | None = None) -> None:
        self._layers = layers
        self._session: Session | None = None
        self._probe: ActivationProbe | None = None
        self._watched: Sequence[Layer] = ()
        self._served: Mapping[str, Tensor] = {}
        self._real: Tensor | None = None
        self._rows: dict[tuple[str, int], Tensor] = {}
        self._totals: dict[_Network, ActivationTotals] = {}
        self._squares: dict[tuple[_Network, Role], Tensor] = {}

    def begin(self, session: Session) -> None:
        """A due step begins: watch the networks."""
        self.release()
        self._session = session
        self._totals.clear()
        self._squares.clear()
        self._watched = probed_layers(session, self._layers, "activations")
        if self._watched:
            self._probe = ActivationProbe(session.model, self._watched, self._observe)
            self._probe.attach()

    def observe_inputs(self, microbatch: Microbatch) -> None:
        """The model is about to run: note which positions each network serves."""
        self._forget_batch()
        if self._session is None or self._session.family is None or microbatch.view is None:
            return
        self._served = self._session.family.served(microbatch.view)
        self._real = microbatch.view.real

    def release(self) -> None:
        """Take the hooks off."""
        if self._probe is not None:
            self._probe.detach()
        self._probe = None
        self._forget_batch()

    def finish(self) -> None:
        """The due step has ended: hand over what was measured."""
        session, totals, squares = self._session, dict(self._totals), dict(self._squares)
        watched, self._watched, self._session = self._watched, (), None
        self._totals.clear()
        self._squares.clear()
        if session is None:
            return
        for layer in watched:
            for name, network in layer.feed_forward.items():
                if (layer.index, name) not in totals:
                    session.recorder.absent(_prefix((layer.index, name)), NOT_RUN)
                elif network.residual is None:
                    session.recorder.absent(f"{_prefix((layer.index, name))}/residual_share", NO_RESIDUAL)
        if totals:
            session.recorder.defer(_packed(totals, squares), _add_metrics)

    def _observe(self, layer: int, name: str, role: Role, tensor: Tensor) -> None:
        if self._session is not None and self._real is not None and name in self._served:
            self._session.measure(self, self._measure, (layer, name), role, tensor)

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
