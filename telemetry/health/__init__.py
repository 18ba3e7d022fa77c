"""What is wrong, in one line, with the evidence and what to do: rules over recorded values."""

from __future__ import annotations

from telemetry.health.monitor import HealthMonitor, check_findings

__all__ = ["HealthMonitor", "check_findings"]
