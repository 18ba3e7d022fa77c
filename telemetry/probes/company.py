"""Keeps ranks together whose forward passes need each other, while each generates at its own pace."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

from torch import nn

from telemetry.probes.lockstep import Lockstep
from telemetry.probes.sharding import fsdp2_modules, is_fsdp1, is_zero3


class RanksPartedError(RuntimeError):
    """A rank did not come in time: what needs all ranks is given up."""


@contextlib.contextmanager
def in_company(model: nn.Module, lockstep: Lockstep, idle: Callable[[], object]) -> Iterator[None]:
    """Inside, every forward pass of ``model`` happens on all ranks at the same time, however many each rank makes.

    Before each of its forward passes a rank tells the others; whoever is done with the inside, or has left it with an
    exception, runs ``idle`` whenever another has a pass to make, until nobody has. So prompts may be uneven, and a rank
    that fails between two passes does not leave the others waiting (as ranks that generate in step with transformers'
    ``synced_gpus`` do when one of them raises).

    Enter it on every rank.

    Args:
        model: its forward pass is collective.
        lockstep: how ranks tell each other.
        idle: makes one forward pass and throws the result away.

    Raises:
        RanksPartedError: inside, in a forward pass, when another rank has not come in time.
    """
    watched = True

    def before(_module: nn.Module, _args: Any) -> None:
        if watched:
            lockstep.agree(False, what="clips")  # "I am not done"
            _require(lockstep)

    # In front of FSDP's own hook, which is where ranks meet.
    handle = model.register_forward_pre_hook(before, prepend=True)
    try:
        yield
    finally:
        watched = False
        handle.remove()
        while lockstep.together and not lockstep.agree(True, what="clips") and lockstep.together:
            idle()


def can_keep_company(model: nn.Module, always: Collection[nn.Module]) -> bool:
    """Whether any two forward passes of a model have the same collectives: FSDP2 around modules that always run.

    FSDP2 gathers parameters where a sharded module is called, DeepSpeed's ZeRO-3 and FSDP wherever one holds some. A
    prompt's pass embeds text, a later one does not: were the embedding sharded by itself, ranks would wait for
    different things.

    Args:
        model: its forward pass is collective.
        always: the modules that every forward pass calls, in the same order.
    """
    if is_fsdp1(model) or any(is_zero3(parameter) for parameter in model.parameters()):
        return False
    sharded = fsdp2_modules(model)
    return bool(sharded) and all(any(module is other for other in always) for module in sharded)


def _require(lockstep: Lockstep) -> None:
    if not lockstep.together:
        raise RanksPartedError("a rank did not come in time")
