"""Where metrics lie in flat vectors, so that all ranks' values come together by one sum and one maximum."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from torch import Tensor

from telemetry.records import Metric, Spread

Entry: TypeAlias = tuple[str, type[Metric], tuple[tuple[int, ...], ...]]
"""A metric's tag, its kind, and the shape of each component."""


def is_flat(metric: Metric) -> bool:
    """Return whether ranks' values of a metric combine number by number."""
    return type(metric).merge is Metric.merge or isinstance(metric, Spread)


def entries_of(metrics: Mapping[str, Metric]) -> tuple[Entry, ...]:
    """Return what metrics are, without their values."""
    return tuple(
        (tag, type(metric), tuple(tuple(part.shape) if isinstance(part, Tensor) else () for part in metric.components))
        for tag, metric in metrics.items()
    )


@dataclass(frozen=True)
class _Place:
    """Where a component lies; ``sign``: 0 in what is summed, else in what the maximum is taken of, -1 for a minimum."""

    begin: int
    end: int
    shape: tuple[int, ...]
    sign: int


class Layout:
    """The places of metrics' components, the same for the same entries in any order.

    Attributes:
        entries: each of them, sorted.
        id: a number of 62 bits that names them.
        sums, extremes: how long the two vectors are.
    """

    def __init__(self, entries: Iterable[Entry]) -> None:
        self.entries = sorted(set(entries), key=_described)
        said = "\n".join(map(repr, map(_described, self.entries)))
        self.id = int.from_bytes(hashlib.blake2b(said.encode(), digest_size=8).digest(), "big") >> 2
        self.sums = self.extremes = 0
        self._places: dict[Entry, tuple[_Place, ...]] = {}
        spreads: list[np.ndarray] = []
        for entry in self.entries:
            _, kind, shapes = entry
            self._places[entry] = tuple(self._placed(op, shape) for op, shape in zip(kind.ops, shapes, strict=True))
            if issubclass(kind, Spread):
                parts = (np.arange(place.begin, place.end) for place in self._places[entry])
                spreads.append(np.array(np.broadcast_arrays(*parts)))
        self._spreads = np.concatenate(spreads, axis=1) if spreads else None

    def covers(self, entries: Iterable[Entry]) -> bool:
        """Return whether all entries have a place here."""
        return all(entry in self._places for entry in entries)

    def pack(self, metrics: Mapping[Entry, Metric]) -> tuple[np.ndarray, np.ndarray]:
        """Return what is to be summed and what the maximum is to be taken of; an entry that is missing changes neither.

        A minimum is the maximum of what has the opposite sign.
        """
        sums, extremes = np.zeros(self.sums), np.full(self.extremes, -math.inf)
        for entry, metric in metrics.items():
            for place, part in zip(self._places[entry], metric.components, strict=True):
                value = part.reshape(-1).numpy() if isinstance(part, Tensor) else part
                if place.sign == 0:
                    sums[place.begin : place.end] = value
                else:
                    extremes[place.begin : place.end] = place.sign * value
        return sums, extremes

    def present(self, metrics: Mapping[Entry, Metric]) -> np.ndarray:
        """Return 1 for each entry that is there, 0 for each that is not."""
        return np.fromiter((entry in metrics for entry in self.entries), dtype=np.float64, count=len(self.entries))

    def unpack(self, sums: np.ndarray, extremes: np.ndarray, entry: Entry) -> list[np.ndarray]:
        """Return an entry's components as they have come together."""
        return [
            (sums[place.begin : place.end] if place.sign == 0 else place.sign * extremes[place.begin : place.end])
            .reshape(place.shape)
            for place in self._places[entry]
        ]  # fmt: skip

    @property
    def has_spreads(self) -> bool:
        """Whether there are spreads, whose mean all ranks have to know before their deviations can be summed."""
        return self._spreads is not None

    def first_moments(self, sums: np.ndarray) -> np.ndarray:
        """Return each spread's count and total, to be summed over ranks for :meth:`centre`."""
        assert self._spreads is not None
        counts, means, _ = sums[self._spreads]
        return np.stack([counts, np.where(counts > 0, counts * means, 0.0)])

    def centre(self, sums: np.ndarray, moments: np.ndarray, first: bool) -> None:
        """Take spreads' deviations from the mean of all ranks, so that they add up. The first rank tells that mean."""
        assert self._spreads is not None
        at = self._spreads
        counts, means, deviations = sums[at]
        with np.errstate(divide="ignore", invalid="ignore"):
            common = np.where(moments[0] > 0, moments[1] / moments[0], 0.0)
            apart = np.where(counts > 0, means - common, 0.0)
            sums[at[2]] = deviations + counts * apart * apart
        sums[at[1]] = common if first else 0.0

    def _placed(self, op: str, shape: tuple[int, ...]) -> _Place:
        size = math.prod(shape)
        if op == "sum":
            begin, self.sums = self.sums, self.sums + size
            return _Place(begin, self.sums, shape, 0)
        begin, self.extremes = self.extremes, self.extremes + size
        return _Place(begin, self.extremes, shape, 1 if op == "max" else -1)


def _described(entry: Entry) -> tuple[str, str, Sequence[tuple[int, ...]]]:
    tag, kind, shapes = entry
    return tag, f"{kind.__module__}.{kind.__qualname__}", shapes
