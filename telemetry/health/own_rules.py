"""Rules of a user's own, and other limits for those that there are: a mapping, or a YAML or JSON file of one.

loss_steady: {times: 5}                      # another limit of a rule
reference_used: off                          # a rule that is not wanted
words: zero_shot/wer > 0.5 : failing         # a rule of one's own: a value,
drop: outputs/accuracy/audio change < -20%   # against the median of the values before it,
spike: train/grad_norm z > 6 over 50         # or in standard deviations of the 50 before it
"""

from __future__ import annotations

import dataclasses
import fnmatch
import math
import operator
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from telemetry.health.history import KEPT, History
from telemetry.health.rulebook import RULES
from telemetry.health.rules import Judge, Level, Limits, Rule, Verdict, evidence

OVER = 20
FEWEST = 5
_COMPARES = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}
_LINE = re.compile(
    r"(?P<tag>\S+)(?:\s+(?P<kind>change|z))?\s*(?P<compare>[<>]=?)\s*(?P<limit>[-+]?[0-9.]+(?:[eE][-+]?[0-9]+)?)"
    r"(?P<percent>\s*%)?(?:\s+over\s+(?P<over>[0-9]+))?(?:\s*:\s*(?P<level>warning|failing))?"
)
_LOOKS_LIKE = "TAG > 0.5, TAG change < -20% over 10 or TAG z > 6, with : failing after it for more than a warning"


def rules_of(given: str | Path | Mapping[str, Any] | None) -> tuple[Rule, ...]:
    """Return the rules to judge by.

    Args:
        given: name of a rule → ``off``, or a mapping of its limits; any other name → a rule of one's own in one line.
            Or the path of a YAML or JSON file with such a mapping.

    Raises:
        ValueError: names the file, the rule, what is wrong with it and what it may be.
    """
    if given is None:
        return RULES
    where = "health_rules"
    if not isinstance(given, Mapping):
        where, given = f"health_rules {given}", _read(Path(given))
    rules = {rule.name: rule for rule in RULES}
    for name, said in given.items():
        if name not in rules:
            rules[name] = _own(where, str(name), said)
        elif said is False or said == "off":
            del rules[name]
        else:
            rules[name] = _limited(where, rules[name], said)
    return tuple(rules.values())


def _read(path: Path) -> Mapping[str, Any]:
    import yaml

    try:
        given = yaml.safe_load(path.expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"health_rules {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"health_rules {path}: no YAML or JSON: {error}") from None
    if not isinstance(given, Mapping):
        raise ValueError(f"health_rules {path}: a mapping of names to rules is expected")
    return given


def _limited(where: str, rule: Rule, said: Any) -> Rule:
    limits = ", ".join(f"{name} ({value:g})" for name, value in rule.limits.items()) or "none"
    if not isinstance(said, Mapping):
        raise ValueError(f"{where}: {rule.name}: 'off' or limits are expected, got {said!r}; it has {limits}")
    for name, value in said.items():
        if name not in rule.limits:
            raise ValueError(f"{where}: {rule.name} has no limit {name!r}; it has {limits}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{where}: {rule.name}: limit {name} must be a number, got {value!r}")
    return dataclasses.replace(rule, limits={**rule.limits, **said})


def _own(where: str, name: str, said: Any) -> Rule:
    if not re.fullmatch(r"\w+", name):
        raise ValueError(f"{where}: {name!r} is no name of a rule: letters, digits and _ are expected")
    match = _LINE.fullmatch(said.strip()) if isinstance(said, str) else None
    if match is None:
        known = ", ".join(rule.name for rule in RULES)
        raise ValueError(
            f"{where}: {name}: {said!r} is neither a limit of a rule that there is ({known}) nor a rule: {_LOOKS_LIKE}"
        )
    limit = float(match["limit"]) / (100 if match["percent"] else 1)
    over = int(match["over"] or OVER)
    if match["percent"] and match["kind"] != "change":
        raise ValueError(f"{where}: {name}: % is of a change: {_LOOKS_LIKE}")
    if match["over"] and not match["kind"]:
        raise ValueError(f"{where}: {name}: a value is compared as it is, over nothing: {_LOOKS_LIKE}")
    if match["over"] and not FEWEST <= over < KEPT:
        raise ValueError(f"{where}: {name}: over {over}: {FEWEST} to {KEPT - 1} values are kept")
    level = Level.FAILING if match["level"] == "failing" else Level.WARNING
    judge = _judge(match["tag"], match["kind"], match["compare"], limit, over, level)
    advice = "what the rule was written for"
    return Rule(name, f"not {said}", said, judge, advice, absent="nothing matches, or fewer than 5 values before")


def _judge(tag: str, kind: str | None, compare: str, limit: float, over: int, level: Level) -> Judge:
    """Of every tag that matches, the newest value, or how far it is from those before it."""
    pattern, holds = re.compile(fnmatch.translate(tag)), _COMPARES[compare]

    def judge(history: History, limits: Limits) -> Verdict | None:
        measured = {one: _distance(kind, history.values(one), over) for one in history.matching(pattern)}
        known = {one: value for one, value in measured.items() if value is not None and not math.isnan(value)}
        if not known:
            return None
        bad = {one: value for one, value in known.items() if holds(value, limit)}
        what = f" ({kind} over {over})" if kind else ""
        return Verdict(level if bad else Level.OK, evidence(bad or known) + what)

    return judge


def _distance(kind: str | None, values: Sequence[float], over: int) -> float | None:
    """The newest value itself, its relative change, or its distance in standard deviations; None of too few."""
    if kind is None:
        return values[-1]
    past = [value for value in values[-over - 1 : -1] if math.isfinite(value)]
    if len(past) < FEWEST:
        return None
    if kind == "change":
        usual = statistics.median(past)
        return (values[-1] - usual) / abs(usual) if usual else None
    spread = statistics.pstdev(past)
    return (values[-1] - statistics.fmean(past)) / spread if spread else None
