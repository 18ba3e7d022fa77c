"""Judges every step by the rules."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from telemetry.health.history import History
from telemetry.health.rules import RULES, Level, Rule, Verdict
from telemetry.records import Alert, Record, Scalar, Table

LEVELS = {"failing": Level.FAILING, "warning": Level.WARNING}
COLUMNS = ("finding", "verdict", "evidence", "what to do")


def check_findings(names: Sequence[str]) -> tuple[str, ...]:
    """Return what a training is to be stopped for, each known.

    Raises:
        ValueError: names what is neither a level nor a rule.
    """
    known = (*LEVELS, *(rule.name for rule in RULES))
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"stop_on: unknown {', '.join(unknown)}: choose from {', '.join(known)}")
    return tuple(names)


class HealthMonitor:
    """Follows a run's scalars and says what is wrong.

    Args:
        rules: what to judge by.
    """

    def __init__(self, rules: Sequence[Rule] = RULES) -> None:
        self._rules = rules
        self._history = History()
        self._levels: dict[str, Level] = {}
        self._faults: dict[str, str] = {}

    def reason_to_stop(self, on: Collection[str]) -> str:
        """Say what has been found that a training is to be stopped for; "" for nothing. From any thread.

        Args:
            on: ``failing`` for any finding of that level, ``warning`` for any finding, or names of rules.
        """
        least = min((level for name, level in LEVELS.items() if name in on), default=None)
        for name, fault in [*self._faults.items()]:
            level = self._levels.get(name, Level.OK)
            if level and (name in on or (least is not None and level >= least)):
                return fault
        return ""

    def check(self, step: int, records: Sequence[Record], due: bool) -> list[Record]:
        """Take in what was recorded, and judge.

        Args:
            step: the optimizer step.
            records: what was recorded at it, all ranks' values already in one.
            due: whether these are a due step's own. Between due steps there are alerts only.

        Returns:
            For a due step ``health/<rule>`` of every rule that has something to judge, and the table
            ``health/checks``; an alert for every rule whose verdict has become worse.
        """
        self._history.add(step, records)
        verdicts = [(rule, verdict) for rule in self._rules if (verdict := rule.judge(self._history)) is not None]
        found: list[Record] = [*self._alerts(step, verdicts, due)]
        if due and verdicts:
            found += [Scalar(f"health/{rule.name}", float(verdict.level)) for rule, verdict in verdicts]
            found.append(_table(verdicts))
        return found

    def _alerts(self, step: int, verdicts: Sequence[tuple[Rule, Verdict]], due: bool) -> list[Alert]:
        alerts = []
        for rule, verdict in verdicts:
            held = self._levels.get(rule.name, Level.OK)
            if verdict.level > held:
                alerts.append(_alert(step, rule, verdict))
                self._faults[rule.name] = f"{rule.fault} (step {step}: {verdict.evidence})"
            # What lies between due steps shows too little to call a fault mended.
            self._levels[rule.name] = verdict.level if due else max(held, verdict.level)
        return alerts


def _alert(step: int, rule: Rule, verdict: Verdict) -> Alert:
    text = f"Step {step}: {verdict.evidence}. What to do: {rule.advice}."
    level = "error" if verdict.level == Level.FAILING else "warning"
    return Alert("health/alerts", rule.fault, text, level)  # type: ignore[arg-type]


def _table(verdicts: Sequence[tuple[Rule, Verdict]]) -> Table:
    """The worst first."""
    ranked = sorted(verdicts, key=lambda pair: -pair[1].level)
    return Table(
        "health/checks",
        COLUMNS,
        tuple(
            (
                rule.fault if verdict.level else rule.title,
                verdict.level.name.lower(),
                verdict.evidence,
                rule.advice if verdict.level else "",
            )
            for rule, verdict in ranked
        ),
    )
