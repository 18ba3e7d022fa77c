"""Which rank has the most and the least of a number that each has of its own: the slow one, the odd one."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from telemetry.delivery.recorder import Emitter, Recorder
from telemetry.records import Max, Metric, Min

_RANKS = 2**20 - 1  # the last 20 of a number's 52 bits, which are its rank's: it is right to 1e-9


class ByRank(Metric):
    """The most and the least of a finite number, each with its rank in its last bits: as small for many ranks."""

    ops = ("max", "min")
    shown = False

    @classmethod
    def of(cls, rank: int, value: float) -> ByRank:
        """A rank's number."""
        [bits] = struct.unpack("q", struct.pack("d", value))
        [marked] = struct.unpack("d", struct.pack("q", bits & ~_RANKS | rank & _RANKS))
        return cls(marked, marked)

    def extremes(self) -> tuple[tuple[float, int], tuple[float, int]]:
        """The most and the least, each with its rank."""
        most, least = (_unmarked(float(one)) for one in self.components)
        return most, least


def _unmarked(marked: float) -> tuple[float, int]:
    [bits] = struct.unpack("q", struct.pack("d", marked))
    [value] = struct.unpack("d", struct.pack("q", bits & ~_RANKS))
    return value, bits & _RANKS


@dataclass(frozen=True)
class Extremes:
    """Shows the most and the least that ranks have of a number, and which ranks these are.

    Attributes:
        tag: of the number, ``<section>/<name>``; the extremes are ``<section>/<most or least>/<name>``.
        most, least: what the ranks are called.
    """

    tag: str
    most: str
    least: str

    def add(self, rank: int | None, to: Recorder | Emitter, value: float) -> None:
        """Add a rank's number; of a single process, None, nothing."""
        if rank is not None:
            to.metric(f"{self.tag}/by_rank", ByRank.of(rank, value))

    def show(self, _host: Mapping[str, Tensor], emit: Emitter) -> None:
        """Show them, where two ranks have a number: see :meth:`Recorder.show`."""
        merged = emit.merged(f"{self.tag}/by_rank")
        if not isinstance(merged, ByRank):
            return
        section, _, name = self.tag.partition("/")
        (high, highest), (low, lowest) = merged.extremes()
        if highest != lowest:  # of equal numbers these are the first and the last rank
            emit.metric(f"{section}/{self.most}/{name}", Max(high), f"rank {highest}")
            emit.metric(f"{section}/{self.least}/{name}", Min(low), f"rank {lowest}")
