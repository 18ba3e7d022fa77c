"""Rules of a user's own, and other limits for those that there are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from telemetry import StrategicTelemetry
from telemetry.health import RULES, HealthMonitor, rules_of
from telemetry.records import Scalar, Table


def judged(rules: Any, *steps: Mapping[str, float]) -> dict[str, float]:
    """The levels after several due steps."""
    monitor = HealthMonitor(rules_of(rules))
    for step, values in enumerate(steps, 1):
        found = monitor.check(step, [Scalar(tag, value) for tag, value in values.items()], due=True)
    return {one.tag.removeprefix("health/"): one.value for one in found if isinstance(one, Scalar)}


@pytest.mark.parametrize(
    ("line", "past", "well", "bad", "level"),
    [
        ("my/tag > 0.5", [], 0.5, 0.6, 1),
        ("my/tag >= 0.5 : failing", [], 0.4, 0.5, 2),
        ("my/tag<-1e-3", [], 0.0, -0.01, 1),
        ("my/tag change > 20%", [10.0] * 5, 11.9, 12.1, 1),
        ("my/tag change < -0.5 over 6 : failing", [1.0, 99.0, 99.0, 10.0, 10.0, 10.0, 10.0], 30.0, 4.0, 2),
        ("my/tag z > 3", [9.0, 11.0] * 3, 12.9, 13.1, 1),
        ("my/tag z < -3 over 6", [500.0, *[9.0, 11.0] * 3], 7.1, 6.9, 1),
        ("my/* > 0.5", [], 0.5, 0.6, 1),
    ],
)
def test_a_line_judges_a_value_a_change_or_a_distance(
    line: str, past: list[float], well: float, bad: float, level: int
) -> None:
    steps = [{"my/tag": value} for value in past]
    assert judged({"mine": line}, *steps, {"my/tag": well})["mine"] == 0
    assert judged({"mine": line}, *steps, {"my/tag": bad})["mine"] == level


def test_too_little_says_nothing() -> None:
    assert "mine" not in judged({"mine": "my/tag z > 3"}, *[{"my/tag": 1.0}] * 4)
    assert "mine" not in judged({"mine": "other/tag > 3"}, {"my/tag": 1.0})
    assert "mine" not in judged({"mine": "my/tag z > 3"}, *[{"my/tag": 1.0}] * 9)  # no deviation to measure in


def test_limits_are_data_and_a_rule_can_be_off() -> None:
    jump = [{"train/loss": 1.0}] * 20 + [{"train/loss": 4.0}]
    assert judged(None, *jump)["loss_steady"] == 1
    assert judged({"loss_steady": {"times": 5}}, *jump)["loss_steady"] == 0
    assert "loss_steady" not in judged({"loss_steady": "off"}, *jump)
    assert "loss_steady" not in judged({"loss_steady": False}, *jump)  # as YAML reads off


@pytest.mark.parametrize("write", [json.dumps, lambda rules: "".join(f"{n}: {r}  # mine\n" for n, r in rules.items())])
def test_a_file_is_yaml_or_json(tmp_path: Path, write: Any) -> None:
    file = tmp_path / "rules"
    file.write_text(write({"words": "zero_shot/wer > 0.5"}))
    assert judged(str(file), {"zero_shot/wer": 0.6})["words"] == 1


def test_it_is_shown_and_stops_as_any_other() -> None:
    monitor = HealthMonitor(rules_of({"words": "zero_shot/wer > 0.5 : failing"}))
    found = monitor.check(3, [Scalar("zero_shot/wer", 0.75)], due=True)
    (table,) = [one for one in found if isinstance(one, Table)]
    assert table.rows[0][:3] == ("zero_shot/wer > 0.5 : failing", "failing", "zero_shot/wer = 0.75")
    assert monitor.reason_to_stop(["words"]).startswith("zero_shot/wer > 0.5")
    made = StrategicTelemetry(stop_on="words", health_rules={"words": "zero_shot/wer > 0.5"})
    assert made.stop_on == ("words",)


@pytest.mark.parametrize(
    ("rules", "said"),
    [
        ({"loss_steady": {"time": 5}}, r"loss_steady has no limit 'time'; it has times \(3\), past \(20\)"),
        ({"loss_steady": {"times": "5"}}, "limit times must be a number, got '5'"),
        ({"loss_steady": 5}, "'off' or limits are expected, got 5"),
        (
            {"mine": "wer is bad"},
            "mine: 'wer is bad' is neither a limit of .* nor a rule: TAG > 0.5",
        ),
        ({"mine": "a/b > 20%"}, "% is of a change"),
        ({"mine": "a/b > 2 over 9"}, "compared as it is"),
        ({"mine": "a/b z > 2 over 1000"}, "5 to 99 values are kept"),
        ({"my rule": "a/b > 2"}, "'my rule' is no name of a rule"),
        ("no/such/file.yaml", r"health_rules no/such/file\.yaml: No such file"),
    ],
)
def test_what_cannot_be_read_is_refused_before_training(rules: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        StrategicTelemetry(health_rules=rules)


def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    for number, text in enumerate(("[1, 2]", "a: [", "\x00")):
        file = tmp_path / str(number)
        file.write_text(text)
        with pytest.raises(ValueError, match=f"health_rules .*{number}: "):
            rules_of(file)
    assert rules_of(None) is RULES
