"""When a watched model runs: from the beginning of a forward pass to its end, however it ends."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.hooks import RemovableHandle


class ForwardWindow:
    """Tells when a forward pass of a model begins and ends, between :meth:`attach` and :meth:`detach`.

    What gradient checkpointing runs again happens in the backward pass, outside: it is not counted twice. Neither is
    what runs on the model's parts elsewhere, as generation does.

    Args:
        model: what is called.
        begin, end: told; ``end`` also when the forward pass raises.
    """

    def __init__(self, model: nn.Module, begin: Callable[[], None], end: Callable[[], None]) -> None:
        self._model = model
        self._begin = begin
        self._end = end
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Start watching."""
        self.detach()
        self._handles = [
            self._model.register_forward_pre_hook(self._before),
            self._model.register_forward_hook(self._after, always_call=True),
        ]

    def detach(self) -> None:
        """Stop watching; a forward pass that has not ended is over."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._end()

    def _before(self, _module: nn.Module, _args: Any) -> None:
        self._begin()

    def _after(self, _module: nn.Module, _args: Any, _output: Any) -> None:
        self._end()


@contextlib.contextmanager
def unseen() -> Iterator[None]:
    """Operations inside are part of nothing: of no graph, and of no list that a dispatch mode keeps.

    Selective activation checkpointing is such a mode: it keeps what operations gave, to hand it out again in their
    order, and would hand out the wrong one.
    """
    with torch.no_grad(), _disable_current_modes():
        yield
