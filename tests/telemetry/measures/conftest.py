"""What every measure is held to: it reads no value, copies little and leaves its inputs and the random state alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.waiting import Watch
from torch import Tensor


@pytest.fixture
def watched() -> Callable[..., tuple[Any, Watch]]:
    """Calls a measure on tensors; asserts that it waits for nothing and disturbs nothing. Returns result and watch."""

    def call(measure: Callable[..., Any], *tensors: Tensor) -> tuple[Any, Watch]:
        before = [tensor.detach().clone() for tensor in tensors]
        versions = [tensor._version for tensor in tensors]
        random_state = torch.get_rng_state()
        with Watch(tensors) as watch:
            result = measure(*tensors)
        assert watch.operations
        assert not watch.waits, f"waits in {watch.waits}"
        assert torch.equal(torch.get_rng_state(), random_state)
        assert [tensor._version for tensor in tensors] == versions
        for tensor, copy in zip(tensors, before, strict=True):
            torch.testing.assert_close(tensor.detach(), copy, rtol=0, atol=0, equal_nan=True)
        return result, watch

    return call
