"""Feed-forward networks: are the one for text and the one for audio alive?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor

from telemetry.delivery.recorder import Emitter
from telemetry.families.base import Layer
from telemetry.instruments.base import NO_POSITIONS, Instrument, Step, probed_layers
from telemetry.measures.activations import SQUARES, ActivationTotals, activation_totals, counted_squares, served_rows
from telemetry.probes.activations import Role, watch_networks
from telemetry.probes.forward import Microbatch
from telemetry.records import Max, Mean, NormRatio, PresentSum

NOT_RUN = "it did not run, or gave no tensor"
OTHER_POSITIONS = "it is given other positions than those of the batch (virtual tokens of a learned prompt, say)"
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
        self._laid_out = False  # whether any microbatch of the step is
        self._served: Mapping[str, Tensor] = {}
        self._real: Tensor | None = None
        self._rows: dict[tuple[str, int], Tensor] = {}
        self._measured: set[_Network] = set()
        self._unlike: set[_Network] = set()
        self._added_later: set[_Network] = set()  # those whose output is not what is added to the residual stream
        self._residual: dict[_Network, Tensor] = {}  # sums of squares, until what is added to it is known

    def begin(self, step: Step) -> None:
        """A due step begins: watch the networks."""
        self._forget()
        self._watched = probed_layers(step, self._layers, "activations")
        networks = {(layer.index, name): one for layer in self._watched for name, one in layer.feed_forward.items()}
        self._added_later = {network for network, one in networks.items() if one.added is not one.module}
        watch_networks(step.watch, self, self._watched, partial(self._observe, step))

    def inputs(self, step: Step, microbatch: Microbatch) -> None:
        """The model is about to run: note which positions each network serves."""
        self._forget_batch()
        if step.family is None or microbatch.view is None:
            return
        self._laid_out = True
        decoded = microbatch.view.decoded_from
        served = step.family.served(microbatch.view)
        self._served = {name: positions[:, decoded:] for name, positions in served.items()}
        self._real = microbatch.view.real[:, decoded:]

    def finish(self, step: Step) -> None:
        """The due step has ended: hand over what was measured."""
        for layer in self._watched:
            for name, network in layer.feed_forward.items():
                if (layer.index, name) in self._unlike:
                    step.recorder.absent(_prefix((layer.index, name)), OTHER_POSITIONS)
                elif (layer.index, name) not in self._measured:
                    step.recorder.absent(_prefix((layer.index, name)), NOT_RUN if self._laid_out else NO_POSITIONS)
                elif network.residual is None:
                    step.recorder.absent(f"{_prefix((layer.index, name))}/residual_share", NO_RESIDUAL)
        self._forget()

    def _observe(self, step: Step, layer: int, name: str, role: Role, tensor: Tensor) -> None:
        if self._real is None or name not in self._served:
            return
        network = layer, name
        if tensor.dim() == 3 and tensor.shape[:2] != self._real.shape:
            self._unlike.add(network)
            return
        rows, counts = self._counted(name, tensor)
        if role == "residual":
            self._residual[network] = counted_squares(rows, counts)
        elif role == "added":
            self._add_share(step, network, counted_squares(rows, counts))
        else:
            self._measured.add(network)
            totals = activation_totals(rows, counts)
            step.recorder.defer({"totals": totals}, partial(_add, _prefix(network)))
            if network not in self._added_later:
                self._add_share(step, network, totals[SQUARES])

    def _add_share(self, step: Step, network: _Network, added: Tensor) -> None:
        residual = self._residual.pop(network, None)
        if residual is not None:
            step.recorder.metric(f"{_prefix(network)}/residual_share", NormRatio(added, residual))

    def _counted(self, name: str, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """A network's values as ``[rows, hidden]``, and which rows are real positions that it serves."""
        assert self._real is not None  # asked by the caller
        rows = tensor.detach().reshape(-1, tensor.shape[-1])
        whole = tensor.dim() == 3  # of the whole batch
        key = (name, -1 if whole else rows.shape[0])
        if key not in self._rows:
            served, real = self._served[name], self._real
            self._rows[key] = (served & real).reshape(-1) if whole else served_rows(served, real, rows.shape[0])
        return rows, self._rows[key]

    def _forget(self) -> None:
        self._watched = ()
        self._laid_out = False
        self._measured.clear()
        self._unlike.clear()
        self._forget_batch()

    def _forget_batch(self) -> None:
        self._served = {}
        self._real = None
        self._rows.clear()
        self._residual.clear()


def _prefix(network: _Network) -> str:
    return f"activations/layer_{network[0]}/{network[1]}"


def _add(prefix: str, host: Mapping[str, Tensor], emit: Emitter) -> None:
    """Add what a network has given in a microbatch."""
    totals = ActivationTotals(*host["totals"].tolist())
    emit.metric(f"{prefix}/rms", NormRatio(totals.squares, totals.values))
    emit.metric(f"{prefix}/absmax", Max(totals.absmax))
    emit.metric(f"{prefix}/zero_fraction", Mean(totals.zeros, totals.values))
    emit.metric(f"{prefix}/nonfinite", PresentSum(totals.nonfinite, totals.values))
