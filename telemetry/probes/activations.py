"""Catches what feed-forward networks give, and the residual stream that it is added to, with hooks for one step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from telemetry.families.base import FeedForward, Layer
from telemetry.probes.window import ForwardWindow, unseen

Role = Literal["output", "added", "residual"]
Sink = Callable[[int, str, Role, Tensor], None]


class ActivationProbe:
    """Watches the feed-forward networks of some layers while the model runs, between :meth:`attach` and :meth:`detach`.

    Args:
        model: what the Trainer calls, without its DDP or FSDP wrapper.
        layers: those to watch.
        sink: given layer, network, what it is and the tensor, on the training thread, without gradients. Keeps no
            tensor, and must not raise.
    """

    def __init__(self, model: nn.Module, layers: Sequence[Layer], sink: Sink) -> None:
        self._layers = layers
        self._sink = sink
        self._running = False
        self._handles: list[RemovableHandle] = []
        self._window = ForwardWindow(model, self._begin, self._end)

    def attach(self) -> None:
        """Start watching forward passes."""
        self.detach()
        self._window.attach()
        for layer in self._layers:
            for name, network in layer.feed_forward.items():
                self._watch(layer.index, name, network)

    def detach(self) -> None:
        """Take all hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._window.detach()

    def _watch(self, layer: int, name: str, network: FeedForward) -> None:
        def tell(role: Role, value: Any) -> None:
            tensor = value[0] if isinstance(value, tuple) and value else value
            if self._running and isinstance(tensor, Tensor):
                with unseen():
                    self._sink(layer, name, role, tensor)

        if network.residual is not None:

            def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                tell("residual", args[0] if args else next(iter(kwargs.values()), None))

            self._handles.append(network.residual.register_forward_pre_hook(before, with_kwargs=True))

        def after(role: Role) -> Callable[[nn.Module, Any, Any], None]:
            return lambda _module, _args, output: tell(role, output)

        self._handles.append(network.module.register_forward_hook(after("output")))
        if network.residual is not None:
            self._handles.append(network.added.register_forward_hook(after("added")))

    def _begin(self) -> None:
        self._running = True

    def _end(self) -> None:
        self._running = False
