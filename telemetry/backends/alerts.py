"""Alerts that leave the machine: chats, mail, webhooks, whatever Apprise has an address for."""

from __future__ import annotations

import importlib.util
import logging
import threading
from collections.abc import Sequence
from typing import Any

from telemetry.backends.base import Run
from telemetry.once import Once
from telemetry.records import Alert, Record
from telemetry.redaction import redact

logger = logging.getLogger(__name__)


class AlertBackend:
    """Sends the alerts of a step as one message to every address. Whoever does not answer costs the training nothing.

    Nobody is sent elsewhere by a redirect: what is said of a run goes to the addresses that were given.

    Args:
        addresses: Apprise URLs (``slack://...``, ``mailto://...``, ``jsons://host/path``), which hold secrets.

    Raises:
        ImportError: when Apprise is not installed.
        ValueError: for what is no such address. The message does not show it.
    """

    name = "alerts"

    def __init__(self, addresses: Sequence[str]) -> None:
        self._once = Once(logger)
        self._run = Run(logging_dir=".")  # type: ignore[arg-type]
        self._services = [_service(address, number) for number, address in enumerate(addresses, 1)]

    def open(self, run: Run) -> None:
        """Keep what a message says of the run."""
        self._run = run

    def write(self, step: int, records: Sequence[Record]) -> int:
        """Send what is alerting; returns how many alerts some address has not taken."""
        alerts = [record for record in records if isinstance(record, Alert)]
        if not alerts:
            return 0
        title, text, kind = self._message(alerts)
        lost = 0
        with _quiet():
            for service in self._services:
                if not service.notify(title=title, body=text, notify_type=kind):
                    lost = len(alerts)
                    said = "alerts do not reach %s; training goes on, and they stay in alerts.jsonl"
                    self._once.say(service, said, service.url(privacy=True).split("?")[0])
        return lost

    def close(self) -> None:
        """Nothing is left."""

    def _message(self, alerts: Sequence[Alert]) -> tuple[str, str, str]:
        """Title, text and Apprise's kind: the worst first."""
        ranked = sorted(alerts, key=lambda alert: alert.level != "error")
        more = f" (and {len(ranked) - 1} more)" if len(ranked) > 1 else ""
        place = self._run.output_dir or self._run.logging_dir
        lines = [alert.text if alert is ranked[0] else f"{alert.title}: {alert.text}" for alert in ranked]
        lines.append(f"Look: python -m dashboards status {place}")
        kind = {"info": "info", "warning": "warning", "error": "failure"}[ranked[0].level]
        title, text = redact((f"{self._run.name}: {ranked[0].title}{more}", "\n\n".join(lines)))
        return title, text, kind


def _service(address: str, number: int) -> Any:
    if importlib.util.find_spec("apprise") is None:
        raise ImportError("alert_to needs Apprise: pip install 'strategic-telemetry[alerts]'")
    import apprise

    asset = apprise.AppriseAsset(app_id="strategic telemetry", async_mode=False, http_redirects=False)
    with _quiet():
        service = apprise.Apprise.instantiate(address, asset=asset)
    if service is None:
        raise ValueError(
            f"alert_to: address {number} ({address.split(':')[0][:20]}:...) is none that Apprise knows. Addresses look "
            "like slack://..., discord://..., mailto://... or jsons://host/path; its documentation lists them"
        )
    return service


class _quiet:  # noqa: N801  (used as a context)
    """Keeps Apprise's own log lines of this thread away: what matters of them is said once."""

    def __enter__(self) -> None:
        self._thread = threading.get_ident()
        logging.getLogger("apprise").addFilter(self._passes)

    def __exit__(self, *error: object) -> None:
        logging.getLogger("apprise").removeFilter(self._passes)

    def _passes(self, record: logging.LogRecord) -> bool:
        return record.thread != self._thread
