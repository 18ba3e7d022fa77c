"""Lets ranks agree to run the model aside together, where one rank's forward pass needs every other's."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from itertools import count
from typing import Any

import torch.distributed as dist
from torch import nn

from telemetry.probes.sharding import forwards_are_collective, fsdp2_modules, is_fsdp1, is_zero3, ranks_of_a_batch
from telemetry.ranks import all_here

logger = logging.getLogger(__name__)

AGREE_SECONDS = 60.0
_POLL_SECONDS = 0.002

_sessions = count()


class Lockstep:
    """A vote of all ranks, in the store that formed the default process group.

    Not a collective: of one that times out some ranks may have seen the result and others not, and a forward pass that
    only some begin hangs them. In the store the first to decide decides for all.

    Attributes:
        needed: whether a forward pass of the model needs every rank.
        together: whether ranks can still agree on anything: False once one of them has not come in time.
    """

    def __init__(self, store: Any, world_size: int, key: str = "", together: bool = True) -> None:
        self._store = store
        self._world_size = world_size
        self._key = key
        self._rounds: Counter[str] = Counter()
        self.needed = world_size > 1
        self.together = together

    @classmethod
    def join(cls, model: nn.Module) -> Lockstep:
        """The vote of all ranks. Call it on the training thread of every rank, as often on each.

        Where each rank runs ``model`` by itself, its own word is enough. Where not, and not every rank runs telemetry
        (which takes up to 20 s to know), nothing will ever be agreed on.
        """
        if not forwards_are_collective(model):
            return cls(None, 1)
        world_size = dist.get_world_size()
        store = dist.distributed_c10d._get_default_store()
        return cls(store, world_size, f"strategic_telemetry/lockstep/{next(_sessions)}", all_here(world_size))

    def agree(self, able: bool, what: str = "forward") -> bool:
        """Whether every rank is able, which all ranks are told alike. Waits for the slowest, at most 60 s.

        A rank that does not come makes it False, now and from then on, which is said once. Call it on the training
        thread of every rank; ranks that ask about different things do not meet.

        Args:
            able: whether this rank is.
            what: what is about to be run.
        """
        if not self.needed:
            return able
        if not self.together:
            return False
        try:
            return self._vote(able, what)
        except RuntimeError as error:  # the store is gone
            self._give_up(what, str(error))
            return False

    def _vote(self, able: bool, what: str) -> bool:
        number = self._rounds[what]
        self._rounds[what] += 1
        key = f"{self._key}/{what}/{number}"
        self._store.add(f"{key}/able", int(able))
        if self._store.add(f"{key}/arrived", 1) == self._world_size:
            everyone = self._store.add(f"{key}/able", 0) == self._world_size
            self._decide(key, "yes" if everyone else "no")  # unless a rank has given up before
            self._forget(f"{self._key}/{what}/{number - 1}")
        verdict = self._decision(key)
        if verdict == "late":
            self._give_up(what, f"a rank did not come within {AGREE_SECONDS:.0f} s")
        return verdict == "yes"

    def _decision(self, key: str) -> str:
        """The verdict, once there is one; "late" is one, after the time is up."""
        deadline = time.monotonic() + AGREE_SECONDS
        while not self._store.check([f"{key}/verdict"]):
            if time.monotonic() >= deadline:
                return self._decide(key, "late")
            # Not the store's own wait, which would keep every other thread from the store.
            time.sleep(_POLL_SECONDS)
        return str(self._store.get(f"{key}/verdict").decode())

    def _decide(self, key: str, verdict: str) -> str:
        return str(self._store.compare_set(f"{key}/verdict", "", verdict).decode())

    def _forget(self, key: str) -> None:
        """All ranks have come past that round: nobody reads it any more."""
        for name in ("able", "arrived", "verdict"):
            self._store.delete_key(f"{key}/{name}")

    def _give_up(self, what: str, reason: str) -> None:
        self.together = False
        logger.warning("ranks cannot run the model together for %s (%s): not tried again", what, reason)


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
        RuntimeError: inside, in a forward pass, when another rank has not come in time.
    """
    watched = True

    def before(_module: nn.Module, _args: Any) -> None:
        if watched:
            lockstep.agree(False, what="clips")  # "I am not done"
            if not lockstep.together:
                raise RuntimeError("a rank did not come in time")

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
    different things. Ranks that each have a part of every layer add up values, as many as the prompt is long.

    Args:
        model: its forward pass is collective.
        always: the modules that every forward pass calls, in the same order.
    """
    if is_fsdp1(model) or any(is_zero3(parameter) for parameter in model.parameters()):
        return False
    if ranks_of_a_batch(model)[1] > 1:
        return False
    sharded = fsdp2_modules(model)
    return bool(sharded) and all(any(module is other for other in always) for module in sharded)
