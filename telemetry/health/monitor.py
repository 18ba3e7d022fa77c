"""Judges every step by the rules."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from telemetry.catalogue import VERDICTS
from telemetry.health.history import History
from telemetry.health.rulebook import RULES
from telemetry.health.rules import Level, Rule, Verdict
from telemetry.records import Alert, Record, Scalar, Table

LEVELS = {"failing": Level.FAILING, "warning": Level.WARNING}
COLUMNS = ("finding", "verdict", "evidence", "what to do", "what else it could be")
_OF_EVALUATIONS = ("eval/", "zero_shot/")


def check_findings(names: Sequence[str], rules: Sequence[Rule] = RULES) -> tuple[str, ...]:
    """Return what a training is to be stopped for, each known.

    Raises:
        ValueError: names what is neither a level nor a rule.
    """
    known = (*LEVELS, *(rule.name for rule in rules))
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
        self._shown: dict[str, tuple[int, Level]] = {}

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
            due: whether these are a due step's own.

        Returns:
            For a due step or an evaluation ``health/<rule>`` of every rule that has something to judge, and the table
            ``health/checks``; between them, where something has become worse. Of the set-up ``setup/<rule>`` and
            ``setup/checks``, once and where a verdict changes. And an alert for every rule whose verdict
            has become worse, but where another that it follows from says so already.
        """
        self._history.add(step, records)
        verdicts = {
            rule: verdict for rule in self._rules if (verdict := rule.judge(self._history, rule.limits)) is not None
        }
        roots = _roots(verdicts)
        evaluated = any(isinstance(one, Scalar) and one.tag.startswith(_OF_EVALUATIONS) for one in records)
        alerts = self._alerts(step, verdicts, roots, due)
        if not (verdicts and (due or evaluated or alerts)):
            return [*alerts]
        values = [
            Scalar(rule.tag, float(verdict.level))
            for rule, verdict in verdicts.items()
            if self._is_new(step, rule, verdict)
        ]
        tables = [
            _table(section, judged, roots)
            for section in dict.fromkeys(rule.section for rule in verdicts)
            if (judged := {rule: verdict for rule, verdict in verdicts.items() if rule.section == section})
            and (section != "setup" or any(value.tag.startswith("setup/") for value in values))
        ]
        self._shown |= {rule.name: (step, verdict.level) for rule, verdict in verdicts.items()}
        return [*alerts, *values, *tables]

    def _is_new(self, step: int, rule: Rule, verdict: Verdict) -> bool:
        """Whether a verdict is to be shown: once a step, and of the set-up where it is another than before."""
        shown = self._shown.get(rule.name)
        return shown is None or shown[1] != verdict.level or (rule.section == "health" and shown[0] != step)

    def _alerts(
        self, step: int, verdicts: Mapping[Rule, Verdict], roots: Mapping[Rule, Rule], due: bool
    ) -> list[Alert]:
        alerts = []
        for rule, verdict in verdicts.items():
            held = self._levels.get(rule.name, Level.OK)
            level = Level.OK if rule in roots else verdict.level  # it is said by another
            if level > held:
                alerts.append(_alert(step, rule, verdict))
                self._faults[rule.name] = f"{rule.fault} (step {step}: {verdict.evidence})"
            # What lies between due steps shows too little to call a fault mended.
            self._levels[rule.name] = level if due else max(held, level)
        return alerts


def _roots(verdicts: Mapping[Rule, Verdict]) -> dict[Rule, Rule]:
    """What fires because of another that fires → that one."""
    firing = {rule.name: rule for rule, verdict in verdicts.items() if verdict.level}
    found = {}
    for rule in firing.values():
        root = next((firing[name] for name in rule.follows if name in firing), None)
        if root is not None:
            found[rule] = root
    return found


def _alert(step: int, rule: Rule, verdict: Verdict) -> Alert:
    otherwise = f" It could also be: {rule.otherwise}." if rule.otherwise else ""
    text = f"Step {step}: {verdict.evidence}. What to do: {rule.advice}.{otherwise}"
    level = "error" if verdict.level == Level.FAILING else "warning"
    return Alert(f"{rule.section}/alerts", rule.fault, text, level)  # type: ignore[arg-type]


def _table(section: str, verdicts: Mapping[Rule, Verdict], roots: Mapping[Rule, Rule]) -> Table:
    """The worst first; what follows from another after all that stands for itself and is as bad."""
    ranked = sorted(verdicts.items(), key=lambda pair: (-pair[1].level, pair[0] in roots))
    return Table(f"{section}/checks", COLUMNS, tuple(_row(rule, verdict, roots.get(rule)) for rule, verdict in ranked))


def _row(rule: Rule, verdict: Verdict, root: Rule | None) -> tuple[str, str, str, str, str]:
    word = VERDICTS[verdict.level]
    if not verdict.level:
        return rule.title, word, verdict.evidence, "", ""
    if root is not None:
        return f"{rule.fault}, which follows from: {root.fault}", word, verdict.evidence, root.advice, ""
    return rule.fault, word, verdict.evidence, rule.advice, rule.otherwise
