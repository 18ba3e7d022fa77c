"""Counts the records that were lost on their way, whoever lost them."""

from __future__ import annotations

import logging
import threading

logger = logging.getLogger(__name__)


class Losses:
    """Records that a backend was to show and does not; one that two backends lack counts twice.

    Attributes:
        total: how many there are so far.
    """

    def __init__(self) -> None:
        self.total = 0
        self._lock = threading.Lock()

    def add(self, records: int) -> None:
        """Count some more, from any thread. The first are said."""
        if records <= 0:
            return
        with self._lock:
            first = self.total == 0
            self.total += records
        if first:
            logger.warning("telemetry had to drop records; telemetry/dropped_records counts them")
