"""What every measure is held to: it reads no value, copies little and leaves its inputs and the random state alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Each of them makes the host wait for the device, to read a value or to learn the shape of a result.
WAITING = {"_local_scalar_dense", "nonzero", "nonzero_static", "masked_select", "equal", "is_nonzero", "unique_dim"}
WAITING |= {"_unique2", "unique_consecutive", "bincount", "repeat_interleave", "histc"}


class Watch(TorchDispatchMode):
    """Notes the waits and the largest fresh result of what runs inside, views of ``inputs`` left out."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.given = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        self.waits: list[str] = []
        self.calls = 0
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.calls += 1
        masked = name in ("index", "index_put", "index_put_") and any(
            isinstance(leaf, Tensor) and leaf.dtype in (torch.bool, torch.uint8) for leaf in tree_leaves(args[1])
        )
        if name in WAITING or masked:
            self.waits.append(name)
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() not in self.given:
                self.largest = max(self.largest, leaf.numel())
        return result


@pytest.fixture
def watched() -> Callable[..., tuple[Any, Watch]]:
    """Calls a measure on tensors; asserts that it waits for nothing and disturbs nothing. Returns result and watch."""

    def call(measure: Callable[..., Any], *tensors: Tensor) -> tuple[Any, Watch]:
        before = [tensor.detach().clone() for tensor in tensors]
        versions = [tensor._version for tensor in tensors]
        random_state = torch.get_rng_state()
        with Watch(tensors) as watch:
            result = measure(*tensors)
        assert watch.calls > 0
        assert not watch.waits, f"waits in {watch.waits}"
        assert torch.equal(torch.get_rng_state(), random_state)
        assert [tensor._version for tensor in tensors] == versions
        for tensor, copy in zip(tensors, before, strict=True):
            torch.testing.assert_close(tensor.detach(), copy, rtol=0, atol=0, equal_nan=True)
        return result, watch

    return call
