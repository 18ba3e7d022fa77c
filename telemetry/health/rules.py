"""What a rule is, and the simple kinds of judges. A rule judges recorded values alone: it never guesses."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum

from telemetry.health.history import History

NAMED = 3


class Level(IntEnum):
    """How bad it is, as shown in ``health/<rule>``."""

    OK = 0
    WARNING = 1
    FAILING = 2


@dataclass(frozen=True)
class Verdict:
    """What a rule finds.

    Attributes:
        level: how bad.
        evidence: the values that say so.
    """

    level: Level
    evidence: str


Limits = Mapping[str, float]
Judge = Callable[[History, Limits], "Verdict | None"]


@dataclass(frozen=True, eq=False)
class Rule:
    """One thing that can be wrong.

    Attributes:
        name: the last part of its tag ``health/<name>``.
        title: what holds when all is well.
        fault: what to say when it does not.
        judge: the verdict on what was recorded, or None where that says nothing.
        advice: what to do then.
        otherwise: what else it could be.
        limits: the numbers that it judges by, which a user may change.
        follows: rules whose fault explains this one's: where one of them fires, this one is no finding of its own.
        absent: when there is nothing to judge.
        proof: the mistake by which it is known.
        section: of its tag: ``health``, or ``setup`` for what is looked at once, on the first due step.
    """

    name: str
    title: str
    fault: str
    judge: Judge
    advice: str
    otherwise: str = ""
    limits: Limits = field(default_factory=dict)
    follows: tuple[str, ...] = ()
    absent: str = ""
    proof: str = ""
    section: str = "health"

    @property
    def tag(self) -> str:
        """Of its value."""
        return f"{self.section}/{self.name}"


def evidence(values: Mapping[str, float]) -> str:
    """Name some values."""
    named = ", ".join(f"{tag} = {value:.4g}" for tag, value in list(values.items())[:NAMED])
    return named + (f" and {len(values) - NAMED} more" if len(values) > NAMED else "")


def noted(history: History, values: Mapping[str, float]) -> str:
    """Name some values, and what was said beside them."""
    notes = (history.note(tag) for tag in values)
    return "; ".join([evidence(values), *dict.fromkeys(note for note in notes if note)])


def at_least(tag: str) -> Judge:
    """OK from the limit ``least`` up, failing below ``failing``, a warning between."""

    def judge(history: History, limits: Limits) -> Verdict | None:
        value = history.latest(tag)
        if value is None or math.isnan(value):
            return None
        worst = Level.FAILING if value < limits["failing"] else Level.WARNING
        return Verdict(Level.OK if value >= limits["least"] else worst, evidence({tag: value}))

    return judge


def at_most(tag: str, worst: Level) -> Judge:
    """OK up to the limit ``most``, ``worst`` above."""

    def judge(history: History, limits: Limits) -> Verdict | None:
        value = history.latest(tag)
        if value is None or math.isnan(value):
            return None
        return Verdict(Level.OK if value <= limits["most"] else worst, evidence({tag: value}))

    return judge
