"""Catches what feed-forward networks give, and the residual stream that it is added to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from torch import Tensor

from telemetry.families.base import FeedForward, Layer
from telemetry.probes.watch import Watch

Role = Literal["output", "added", "residual"]
Sink = Callable[[int, str, Role, Tensor], None]


def watch_networks(watch: Watch, owner: Any, layers: Sequence[Layer], sink: Sink) -> None:
    """Have ``sink`` told of every feed-forward network of some layers: layer, network, what it is, and the tensor.

    ``added`` comes only where that is not the output itself. The sink must keep no tensor.
    """
    for layer in layers:
        for name, network in layer.feed_forward.items():
            _watch_network(watch, owner, layer.index, name, network, sink)


def _watch_network(watch: Watch, owner: Any, layer: int, name: str, network: FeedForward, sink: Sink) -> None:
    def tell(role: Role, value: Any) -> None:
        tensor = value[0] if isinstance(value, tuple) and value else value
        if isinstance(tensor, Tensor):
            sink(layer, name, role, tensor)

    def residual(args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        tell("residual", args[0] if args else next(iter(kwargs.values()), None))

    watch.after(owner, network.module, lambda output: tell("output", output))
    if network.residual is not None:
        watch.before(owner, network.residual, residual)
        if network.added is not network.module:
            watch.after(owner, network.added, lambda output: tell("added", output))
