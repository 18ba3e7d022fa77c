"""What is to be said once, however often it happens."""

from __future__ import annotations

import logging


class Once:
    """Logs a message the first time that its key comes up.

    Args:
        logger: where to.
    """

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._keys: set[object] = set()

    def say(
        self, key: object, message: str, *args: object, level: int = logging.WARNING, traceback: bool = False
    ) -> None:
        """Log a message, unless its key has come up before; ``traceback``: with that of the exception in hand."""
        if key not in self._keys:
            self._keys.add(key)
            self._logger.log(level, message, *args, exc_info=traceback)
