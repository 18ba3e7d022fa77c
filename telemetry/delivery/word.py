"""Tells every rank what rank 0 knows, where a run is to act on it on all ranks alike."""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from telemetry.once import Once

logger = logging.getLogger(__name__)

WORD_SECONDS = 300.0


class RankWord:
    """Rank 0's word, on the training thread and a gloo group of its own. Ranks wait for it: only where a user asked.

    Args:
        alone: whether this is the only process.
        together: whether all ranks are here to be told.
    """

    def __init__(self, alone: bool = True, together: bool = False) -> None:
        self._alone = alone
        self._together = together
        self._group: Any = None
        self._once = Once(logger)

    def tell(self, said: Any) -> Any:
        """Return what rank 0 says, the same on every rank; None where ranks cannot be told. Call it on every rank.

        Args:
            said: what is said where this is rank 0.
        """
        if self._alone:
            return said
        box = [said]
        try:
            if not self._together:
                raise RuntimeError("telemetry does not run on all of them")
            if self._group is None:
                self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=WORD_SECONDS))
            dist.broadcast_object_list(box, src=0, group=self._group)
        except RuntimeError as error:
            self._together = False
            self._once.say("word", "ranks cannot act together on what rank 0 finds: %s", error)
            return None
        return box[0]
