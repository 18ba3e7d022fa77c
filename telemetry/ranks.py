"""Whether all ranks are here: asked before anything that would wait for one that is not."""

from __future__ import annotations

import time
from itertools import count

import torch.distributed as dist

JOIN_SECONDS = 20.0

_sessions = count()


def all_here(world_size: int) -> bool:
    """Whether every rank calls this within 20 s, which all ranks are told alike. Call it as often on each."""
    store = dist.distributed_c10d._get_default_store()
    key = f"strategic_telemetry/{next(_sessions)}"
    store.add(f"{key}/ranks", 1)
    deadline = time.monotonic() + JOIN_SECONDS
    while (here := store.add(f"{key}/ranks", 0)) < world_size and time.monotonic() < deadline:
        time.sleep(0.01)
    # The first to decide decides for all: a rank that comes late must not wait for ranks that have given up.
    mine = "all" if here >= world_size else "some"
    return bool(store.compare_set(f"{key}/decision", "", mine) == b"all")
