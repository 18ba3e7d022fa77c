"""What telemetry measures and shows: metric values that reduce late, and records ready to be shown.

A *metric value* (:class:`Mean`, :class:`Max`, ...) carries what its reduction needs, so that microbatches and ranks
with unequal token counts combine to what one process would have measured on the whole batch. Its components may be
tensors on any device or plain numbers; nothing here reads a tensor until :meth:`Metric.result` is asked on host
values.

A *record* (:class:`Scalar`, :class:`Table`, :class:`Audio`, ...) is plain host data with a tag. It knows nothing about
any backend.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

Op: TypeAlias = Literal["sum", "max", "min"]
Component: TypeAlias = Tensor | float
Cell: TypeAlias = "str | int | float | bool | Audio | Image | None"
MetricT = TypeVar("MetricT", bound="Metric")

_COMBINE: dict[Op, Callable[[Tensor, Tensor], Tensor]] = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}


class Metric:
    """A value made of components, each combined over microbatches and ranks by its own operation.

    Args:
        components: one tensor (any shape, the same at every call for a tag) or number for each entry of ``ops``.
            Tensors are held as they are, without their graph, and merged as float64; numbers stay numbers.

    Raises:
        ValueError: when the number of components is not the number of ``ops``.
    """

    ops: ClassVar[tuple[Op, ...]] = ()
    shown: ClassVar[bool] = True  # False: no scalar of its own, but an ingredient of what is shown on rank 0

    def __init__(self, *components: Tensor | float) -> None:
        if len(components) != len(self.ops):
            raise ValueError(f"{type(self).__name__} takes {len(self.ops)} components, got {len(components)}")
        self.components: tuple[Component, ...] = tuple(map(_as_component, components))

    def merge(self: MetricT, other: MetricT) -> MetricT:
        """This value and ``other`` as if measured together. Launches device work only; never waits for it."""
        if type(other) is not type(self):
            raise TypeError(f"cannot merge {type(self).__name__} with {type(other).__name__}")
        pairs = zip(self.ops, self.components, other.components, strict=True)
        parts = [_combine(op, ours, theirs) for op, ours, theirs in pairs]
        return self._over(parts)

    def mapped(self: MetricT, convert: Callable[[Any], Any]) -> MetricT:
        """The same kind of value over its components as ``convert`` gives them (their host copies, say)."""
        return self._over(map(convert, self.components))

    def _over(self: MetricT, components: Iterable[Component]) -> MetricT:
        made = type(self).__new__(type(self))
        vars(made).update(vars(self), components=tuple(components))
        return made

    def result(self) -> float | None:
        """The number to show, or None where nothing was measured. Reads the components: call it on host copies."""
        parts: list[Any] = [one if type(one) is float else np.asarray(one) for one in self.components]
        return self._result(*parts)

    def _result(self, *components: np.ndarray) -> float | None:
        raise TypeError(f"{type(self).__name__} has no result of its own")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(str(np.asarray(part).tolist()) for part in self.components)})"


class Mean(Metric):
    """A weighted mean: ``total`` over ``count``. Absent when ``count`` is 0."""

    ops = ("sum", "sum")

    def _result(self, total: np.ndarray, count: np.ndarray) -> float | None:  # type: ignore[override]
        return float(total) / float(count) if count > 0 else None


class Sum(Metric):
    """A count or another total."""

    ops = ("sum",)

    def _result(self, total: np.ndarray) -> float | None:  # type: ignore[override]
        return float(total)


class PresentSum(Metric):
    """A total of something that may not be there at all: absent when ``present`` is 0."""

    ops = ("sum", "sum")

    def _result(self, total: np.ndarray, present: np.ndarray) -> float | None:  # type: ignore[override]
        return float(total) if present > 0 else None


class Max(Metric):
    """The largest value; -inf stands for "nothing measured" and is absent."""

    ops = ("max",)

    def _result(self, value: np.ndarray) -> float | None:  # type: ignore[override]
        return None if value == -math.inf else float(value)


class Min(Metric):
    """The smallest value; +inf stands for "nothing measured" and is absent."""

    ops = ("min",)

    def _result(self, value: np.ndarray) -> float | None:  # type: ignore[override]
        return None if value == math.inf else float(value)


class Norm(Metric):
    """A Euclidean norm, carried as its sum of squares."""

    ops = ("sum",)

    def _result(self, squares: np.ndarray) -> float | None:  # type: ignore[override]
        return float(np.sqrt(squares))


class Means(Metric):
    """Several means over one count, ``totals`` a vector: what a picture is made of, and no scalar."""

    ops = ("sum", "sum")
    shown = False

    def results(self) -> np.ndarray | None:
        """float64, one mean for each total; None when the count is 0. Call it on host copies."""
        totals, count = (np.asarray(component, dtype=np.float64) for component in self.components)
        return totals / count if count > 0 else None


class NormRatio(Metric):
    """The ratio of two Euclidean norms, carried as their sums of squares. Absent when the second is 0."""

    ops = ("sum", "sum")

    def _result(self, squares: np.ndarray, of: np.ndarray) -> float | None:  # type: ignore[override]
        return None if of == 0 else float(np.sqrt(squares) / np.sqrt(of))


class Rate(Metric):
    """What all ranks did, ``amount``, over the ``seconds`` of the slowest. Absent when these are 0."""

    ops = ("sum", "max")

    def _result(self, amount: np.ndarray, seconds: np.ndarray) -> float | None:  # type: ignore[override]
        return float(amount) / float(seconds) if seconds > 0 else None


class PresentMean(Metric):
    """A mean, ``total`` over ``count``, of something that may not be there at all: absent when ``present`` is 0 too."""

    ops = ("sum", "sum", "sum")

    def _result(self, total: np.ndarray, count: np.ndarray, present: np.ndarray) -> float | None:  # type: ignore[override]
        return float(total) / float(count) if count > 0 and present > 0 else None


class Std(Metric):
    """A population standard deviation from ``total``, ``squares`` and ``count``. Absent when ``count`` is 0.

    A caller whose values lie far from zero takes them relative to a fixed shift first: the result is the same.
    """

    ops = ("sum", "sum", "sum")

    def _result(self, total: np.ndarray, squares: np.ndarray, count: np.ndarray) -> float | None:  # type: ignore[override]
        if count <= 0:
            return None
        mean = float(total) / float(count)
        variance = float(squares) / float(count) - mean * mean
        return math.sqrt(variance) if variance > 0 else (0.0 if variance <= 0 else math.nan)


class Spread(Metric):
    """A population standard deviation from ``count``, ``mean`` and the sum of squared ``deviations`` from that mean.

    Merged pairwise (Chan, Golub, LeVeque 1983), so that values far from zero keep their spread, however many and
    wherever measured. Absent when ``count`` is 0.
    """

    ops = ("sum", "sum", "sum")

    def merge(self, other: Metric) -> Spread:
        """See :meth:`Metric.merge`; the mean is no sum."""
        if type(other) is not Spread:
            raise TypeError(f"cannot merge Spread with {type(other).__name__}")
        parts = (*self.components, *other.components)
        n, mean, deviations, m, means, more = (
            _widened(*parts) if any(isinstance(one, Tensor) for one in parts) else parts
        )
        count = n + m
        safe = count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1.0)
        apart, share = means - mean, m / safe
        return Spread(count, mean + apart * share, deviations + more + apart * apart * n * share)

    def _result(self, count: np.ndarray, mean: np.ndarray, deviations: np.ndarray) -> float | None:  # type: ignore[override]
        if count <= 0:
            return None
        variance = float(deviations) / float(count)
        return math.sqrt(variance) if variance > 0 else (0.0 if variance <= 0 else math.nan)


class UsedFraction(Metric):
    """The fraction of the entries of a histogram that are not 0 (codebook use). Absent for an empty histogram."""

    ops = ("sum",)

    def _result(self, counts: np.ndarray) -> float | None:  # type: ignore[override]
        return float((counts > 0).mean()) if counts.sum() > 0 else None


class Perplexity(Metric):
    """The exponential of a histogram's entropy: 1 for one entry, its length for all equally. Absent when empty."""

    ops = ("sum",)

    def _result(self, counts: np.ndarray) -> float | None:  # type: ignore[override]
        total = counts.sum()
        if not total > 0:
            return None
        shares = counts[counts > 0] / total
        return float(np.exp(-(shares * np.log(shares)).sum()))


def _combine(op: Op, ours: Component, theirs: Component) -> Component:
    if isinstance(ours, Tensor) or isinstance(theirs, Tensor):
        return _COMBINE[op](*_widened(ours, theirs))
    if op == "sum":
        return ours + theirs
    if math.isnan(ours) or math.isnan(theirs):
        return math.nan
    return max(ours, theirs) if op == "max" else min(ours, theirs)


def _widened(*components: Component) -> list[Tensor]:
    """Components of which one is a tensor, all as tensors: as float64, or on Apple's GPUs, which have none, float32."""
    device = next(one.device for one in components if isinstance(one, Tensor))
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return [torch.as_tensor(one, dtype=dtype, device=device) for one in components]


def _as_component(component: Component) -> Component:
    if isinstance(component, Tensor):
        return component.detach() if component.requires_grad else component
    return float(component)


@dataclass(frozen=True)
class Scalar:
    """One number. ``note`` is said beside the catalogue's description (how it was measured on this run)."""

    tag: str
    value: float
    note: str = ""


@dataclass(frozen=True)
class Table:
    """Rows of cells under named columns. Cells are shown as they are: backends escape them, never the caller.

    An :class:`Audio` or :class:`Image` cell is also recorded by itself, under its own tag: a backend whose tables
    cannot play or show it points there.

    Raises:
        ValueError: when a row has another length than ``columns``.
    """

    tag: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"{self.tag}: a row of {len(row)} cells under {len(self.columns)} columns: {row!r}")

    @functools.cached_property
    def media(self) -> bool:
        """Whether any cell is a sound or a picture."""
        return any(isinstance(cell, Audio | Image) for row in self.rows for cell in row)

    @functools.cached_property
    def nbytes(self) -> int:
        """Roughly what it holds in memory, without sounds and pictures: they are recorded by themselves too."""
        return sum(len(cell) if isinstance(cell, str) else 8 for row in self.rows for cell in row)


@dataclass(frozen=True)
class Clip:
    """One piece of sound: ``samples`` of shape ``[samples]`` or ``[samples, channels]``.

    Floats are full scale at ±1; signed integers at their type's range. ``sampling_rate`` is in hertz.
    """

    samples: np.ndarray
    sampling_rate: int
    caption: str = ""


@dataclass(frozen=True)
class Audio:
    """Clips to listen to, side by side under one tag."""

    tag: str
    clips: tuple[Clip, ...]


@dataclass(frozen=True)
class Image:
    """A picture: ``pixels`` uint8 of shape ``[height, width, 3]`` or ``[height, width]``.

    ``voice`` says that speech could be made again from it, as from a spectrogram.
    """

    tag: str
    pixels: np.ndarray
    caption: str = ""
    voice: bool = False


@dataclass(frozen=True)
class Alert:
    """Something a person should look at now."""

    tag: str
    title: str
    text: str
    level: Literal["info", "warning", "error"] = "warning"


Record: TypeAlias = Scalar | Table | Audio | Image | Alert


def held_bytes(record: Record) -> int:
    """Roughly what a record holds in memory while it waits."""
    if isinstance(record, Scalar):
        return 64
    if isinstance(record, Table):
        return record.nbytes
    if isinstance(record, Audio):
        return sum(int(clip.samples.nbytes) for clip in record.clips)
    return int(record.pixels.nbytes) if isinstance(record, Image) else len(record.text)
