"""Sees operations that make the host wait for the device."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Each of them makes the host wait for the device, to read a value or to learn the shape of a result.
WAITING = {
    "_local_scalar_dense", "nonzero", "nonzero_static", "masked_select", "is_nonzero", "equal", "_unique2",
    "unique_dim", "unique_consecutive", "bincount", "repeat_interleave", "histc",
}  # fmt: skip


# These read a tensor of the host without an operation that a dispatch mode sees; of a device they wait.
READING = ("tolist", "numpy", "cpu", "__array__")


class Watch(TorchDispatchMode):
    """Notes every operation of the thread that enters it, and which of them wait.

    Attributes:
        operations: by name.
        waits: those of them that wait, and what reads a tensor without one.
        largest: how many values the largest result holds that is no view of ``inputs``.
    """

    def __init__(self, inputs: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.largest = 0
        self._given = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        self.operations: list[str] = []
        self.waits: list[str] = []
        self._patches = ExitStack()
        self._asleep = False

    @contextmanager
    def asleep(self) -> Iterator[None]:
        """Inside, nothing is noted: a model's own forward pass may wait, as it does when it is trained."""
        before, self._asleep = self._asleep, True
        try:
            yield
        finally:
            self._asleep = before

    def __enter__(self) -> Any:
        for name in READING:
            self._patches.enter_context(mock.patch.object(Tensor, name, self._noted(name, threading.get_ident())))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._patches.close()

    def _noted(self, name: str, thread: int) -> Callable[..., Any]:
        method = getattr(Tensor, name)

        def read(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == thread and not self._asleep:
                self.waits.append(name)
            return method(tensor, *args, **kwargs)

        return read

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._asleep:
            return func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.operations.append(name)
        masked = name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            isinstance(leaf, Tensor) and leaf.dtype in (torch.bool, torch.uint8) for leaf in tree_leaves(args[1])
        )
        if name in WAITING or masked:
            self.waits.append(name)
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in self._given:
                self.largest = max(self.largest, leaf.numel())
        return result
