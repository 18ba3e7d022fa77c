"""What is wrong, in one line, with the evidence and what to do: rules over recorded values."""

from __future__ import annotations

from telemetry.health.monitor import HealthMonitor, check_findings
from telemetry.health.own_rules import rules_of
from telemetry.health.rulebook import RULES

__all__ = ["RULES", "HealthMonitor", "check_findings", "rules_of"]
