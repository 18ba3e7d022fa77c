"""Hooks on a model's modules that live for one due step, and see only the passes that training makes."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.hooks import RemovableHandle

Guard = Callable[..., None]
_NONE: Mapping[str, Any] = MappingProxyType({})
_NO_MODES = contextlib.nullcontext()
_nothing = contextlib.nullcontext().__exit__  # takes anything, returns None, and is known wherever Python is


class _Hook:
    """Calls a function with what torch hands to a hook; copied or pickled with a module, it becomes one of no effect.

    So a model may be copied or saved in a due step (moving averages, snapshots), and what is saved needs no telemetry
    to be loaded.
    """

    def __init__(self, function: Callable[..., None]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> None:
        """Call it; a hook that is taken off while it waits for its turn is not given what it had asked for."""
        if not torch.compiler.is_compiling():
            self._function(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (contextlib.nullcontext(), "__exit__")

    def __deepcopy__(self, _memo: Any) -> Callable[..., None]:
        return _nothing


def named_arguments(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
    """Arguments by name, as the signature of a module's forward pass names those that were given by position.

    Those that it has no name for (``*args``) by their place, counted from 0.
    """
    if not args:
        return kwargs
    parameters = inspect.signature(module.forward).parameters.values()
    names = [one.name for one in parameters if one.kind is one.POSITIONAL_OR_KEYWORD]
    names += map(str, range(len(names), len(args)))
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _out_of_sight(function: Callable[..., None], *args: Any) -> None:
    with torch.no_grad(), _disable_current_modes() if torch._C._len_torch_dispatch_stack() else _NO_MODES:
        function(*args)


class Watch:
    """Watches a model from :meth:`open` to :meth:`close`.

    A *pass* is a forward pass of the whole model with gradients enabled, from its beginning to its end, however it
    ends. What runs outside of one is not training's: generation and evaluation inside of a step, reference models that
    share its modules, and what gradient checkpointing runs again in the backward pass. Functions are called without
    gradients, out of sight of dispatch modes: selective activation checkpointing is one that keeps what operations
    gave, to hand it out again in their order, and would hand out the wrong one.

    Args:
        model: what is called, without its DDP or FSDP wrapper.
        guard: calls ``guard(owner, function, *args)``: isolates and times what an owner does.
        usable: False for a compiled model, whose graph hooks would become part of: nothing is watched.
        alive: whether the training is still under way: one that was left in a due step (Ctrl-C in a callback) tells
            nobody, and with the next pass of the model everything is taken off.
    """

    def __init__(
        self, model: nn.Module, guard: Guard, usable: bool = True, alive: Callable[[], bool] = lambda: True
    ) -> None:
        self._alive = alive
        self.usable = usable
        self._model = model
        self._guard = guard
        self._handles: list[RemovableHandle] = []
        self._running = False
        self._begin: list[tuple[Any, Callable[..., None]]] = []
        self._end: list[tuple[Any, Callable[..., None]]] = []

    def open(self) -> None:
        """Start watching the model itself."""
        self.close()
        if not self.usable:
            return
        self._handles = [
            self._model.register_forward_pre_hook(_Hook(self._before), with_kwargs=True),
            self._model.register_forward_hook(_Hook(self._after), with_kwargs=True, always_call=True),
        ]

    def close(self) -> None:
        """Take all hooks off; a pass that has not ended is over."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._over(None)
        self._begin, self._end = [], []

    def passes(self, owner: Any, begin: Callable[[Mapping[str, Any]], None], end: Callable[[Any], None]) -> None:
        """Have ``begin(inputs)`` called with the arguments of every pass, by name, and ``end(outputs)`` after it.

        ``outputs`` is None for a pass that raised or was cut off. Ends are called in the order of their beginnings.
        """
        self._begin.append((owner, begin))
        self._end.append((owner, end))

    def before(
        self, owner: Any, module: nn.Module, function: Callable[[Sequence[Any], Mapping[str, Any]], None]
    ) -> None:
        """Have ``function(args, kwargs)`` called before a module runs in a pass."""

        def hook(_module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] = _NONE) -> None:
            self.see(owner, function, args, kwargs)

        self._handles.append(module.register_forward_pre_hook(_Hook(hook), with_kwargs=True))

    def after(self, owner: Any, module: nn.Module, function: Callable[[Any], None]) -> None:
        """Have ``function(output)`` called after a module has run in a pass."""

        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            self.see(owner, function, output)

        self._handles.append(module.register_forward_hook(_Hook(hook)))

    def see(self, owner: Any, function: Callable[..., None], *args: Any) -> None:
        """Call a function for what happens in a pass; outside of one, nothing is called."""
        if self._running:
            self.call(owner, function, *args)

    def call(self, owner: Any, function: Callable[..., None], *args: Any) -> None:
        """Have an owner do something, isolated and timed, without gradients and out of sight of dispatch modes."""
        self._guard(owner, _out_of_sight, function, *args)

    def _before(self, _module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any] = _NONE) -> None:
        if not self._alive():
            self.close()
            return
        if self._running or not torch.is_grad_enabled():
            return
        self._running = True
        inputs = named_arguments(self._model, args, kwargs)
        for owner, begin in self._begin:
            self.call(owner, begin, inputs)

    def _after(self, *given: Any) -> None:
        self._over(given[-1])

    def _over(self, output: Any) -> None:
        if not self._running:
            return
        self._running = False
        for owner, end in self._end:
            self.call(owner, end, output)
