"""The tables of ``gradients/``: the parameters to look at, and those that training does not reach."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from telemetry.delivery.recorder import Recorder
from telemetry.probes.gradients import TrainedParameter
from telemetry.records import Cell, Component, Metric, Table

SHOWN = 10
SHOWN_NONFINITE = 30
SHOWN_MISSING = 50
NAMED = 5
LARGEST_COLUMNS = ("why", "parameter", "group", "norm", "absmax", "zero fraction", "non-finite", "growth")
MISSING_COLUMNS = ("why", "parameter", "group", "values", "since step", "last gradient at step")
NO_GRADIENT = "no gradient"
NOT_IN_OPTIMIZER = "not in the optimizer"


class ParameterSums(Metric):
    """What a step's gradients sum up to, by parameter: vectors ``[parameters]`` that add up over ranks' parts.

    Squares, largest magnitude, zeros, non-finite values, values.
    """

    ops = ("sum", "max", "sum", "sum", "sum")
    shown = False


class LargestGradients:
    """Makes ``gradients/largest``, in the background. Between steps it keeps one number a parameter."""

    def __init__(self) -> None:
        self._previous: dict[str, float] = {}

    def table(self, names: Sequence[tuple[str, str]], sums: Sequence[Component]) -> Table:
        """The table of a step.

        Args:
            names: name and group of every trained parameter.
            sums: the components of its :class:`ParameterSums`.
        """
        squares, absmax, zeros, nonfinite, values = (np.asarray(part, dtype=np.float64) for part in sums)
        norms = np.sqrt(squares)
        growth = {at: self._growth(names[at][0], float(norms[at])) for at in range(len(names)) if values[at]}
        rows: list[tuple[Cell, ...]] = []
        for why, at in _chosen(norms, nonfinite, growth):
            cells = (float(norms[at]), float(absmax[at]), zeros[at] / values[at], int(nonfinite[at]), growth[at])
            rows.append((why, *names[at], *cells))
        left = len(_broken(norms, nonfinite)) - SHOWN_NONFINITE
        if left > 0:
            rows.append(("non-finite", f"and {left} more", *[None] * 6))
        self._previous = {names[at][0]: float(norms[at]) for at in growth}
        return Table("gradients/largest", LARGEST_COLUMNS, tuple(rows))

    def _growth(self, name: str, norm: float) -> float | None:
        before = self._previous.get(name, 0.0)
        return norm / before if before > 0 and math.isfinite(before) and math.isfinite(norm) else None


def _chosen(norms: np.ndarray, nonfinite: np.ndarray, growth: dict[int, float | None]) -> Iterator[tuple[str, int]]:
    """Why, and the index of a parameter that has a gradient."""
    yield from (("non-finite", at) for at in _broken(norms, nonfinite)[:SHOWN_NONFINITE])
    finite = [at for at in growth if math.isfinite(norms[at])]
    yield from (("largest", at) for at in sorted(finite, key=lambda at: -norms[at])[:SHOWN])
    grown = [(value, at) for at, value in growth.items() if value is not None]
    yield from (("growth", at) for _, at in sorted(grown, key=lambda pair: (-pair[0], pair[1]))[:SHOWN])


def _broken(norms: np.ndarray, nonfinite: np.ndarray) -> list[int]:
    """Indices of parameters with a non-finite value, or a norm beyond float32."""
    return np.flatnonzero((nonfinite > 0) | ~np.isfinite(norms)).tolist()


class MissingGradients:
    """Knows which trained parameters have no gradient or are not in the optimizer, and since when.

    A parameter without a gradient is not called dead: a batch without audio gives the audio parts none.
    """

    def __init__(self) -> None:
        self._since: dict[tuple[str, str], int] = {}
        self._last_gradient: dict[str, int] = {}
        self._said: set[tuple[str, str]] = set()

    def see_gradients(self, step: int, parameters: Sequence[TrainedParameter], recorder: Recorder) -> None:
        """Gradients of a step are there."""
        present = [one.name for one in parameters if one.has_gradient]
        back = [name for name in present if (NO_GRADIENT, name) in self._since]
        if back:
            since = min(self._since[NO_GRADIENT, name] for name in back)
            key = f"gradients back:{sorted(back)}"
            message = "step %d: a gradient for %s, which had none (seen first at step %d)"
            recorder.say_once(key, message, step, _some(back), since, level=logging.INFO)
        self._last_gradient.update(dict.fromkeys(present, step))
        held = set(present)
        self._update(NO_GRADIENT, step, [one.name for one in parameters if one.name not in held])
        self._say(NO_GRADIENT, "step %d: no gradient for %s, though it is to be trained", step, recorder)

    def see_optimizer(
        self, step: int, parameters: Sequence[TrainedParameter], optimizer: Any, recorder: Recorder
    ) -> None:
        """The optimizer is about to step."""
        held = {id(one) for group in optimizer.param_groups for one in group["params"]}
        outside = [one.name for one in parameters if id(one.tensor) not in held]
        if len(outside) == len(parameters):
            reason = "the optimizer holds copies of the parameters: it cannot be said which it leaves out"
            recorder.say_once("optimizer", reason, level=logging.INFO)
            outside = []
        self._update(NOT_IN_OPTIMIZER, step, outside)
        self._say(NOT_IN_OPTIMIZER, "step %d: the optimizer does not hold %s, which is to be trained", step, recorder)

    def table(self, parameters: Sequence[TrainedParameter]) -> Table | None:
        """``gradients/missing``, or None where nothing is missing."""
        by_name = {one.name: one for one in parameters}
        rows: list[tuple[Cell, ...]] = [
            (why, name, by_name[name].group, by_name[name].tensor.numel(), since, self._last_gradient.get(name))
            for (why, name), since in self._since.items()
            if name in by_name
        ]
        if not rows:
            return None
        left = len(rows) - SHOWN_MISSING
        if left > 0:
            rows = [*rows[:SHOWN_MISSING], ("", f"and {left} more", *[None] * 4)]
        return Table("gradients/missing", MISSING_COLUMNS, tuple(rows))

    def _update(self, why: str, step: int, names: Sequence[str]) -> None:
        others = {key: since for key, since in self._since.items() if key[0] != why}
        self._since = others | {(why, name): self._since.get((why, name), step) for name in names}

    def _say(self, why: str, message: str, step: int, recorder: Recorder) -> None:
        new = [key for key in self._since if key[0] == why and key not in self._said]
        self._said.update(new)
        if new:
            recorder.say_once(f"{why}:{new}", message, step, _some([name for _, name in new]))


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
