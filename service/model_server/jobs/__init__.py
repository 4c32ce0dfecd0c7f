"""Jobs: predictions that are asked for now and fetched later.

``store`` keeps them in SQLite, ``queue`` says which comes next, ``consumer`` runs them in a process of its own.
"""

import sqlite3
import time

from model_server.config import JobsConfig
from model_server.jobs import queue, store
from model_server.logs import Log

# How often the log says that the file still can't be used.
_REMINDER_SECONDS = 60.0


class Outage:
    """Whether the file of the jobs can be used, as the log tells it: when that ends, from time to time, and when it is
    over.
    """

    def __init__(self, log: Log) -> None:
        self._log = log
        self._told: float | None = None

    def begin(self, message: str) -> None:
        """It can't be used, or still can't."""
        now = time.monotonic()
        if self._told is None or now - self._told >= _REMINDER_SECONDS:
            self._told = now
            self._log.error("jobs_unavailable", message)

    def end(self) -> None:
        """It can be used, again or as ever."""
        if self._told is not None:
            self._told = None
            self._log.info("jobs_available", "the file of the jobs can be used again")


def create(config: JobsConfig) -> str | None:
    """Make the file where it is missing; why it can't be used, or None."""
    try:
        store.create(config)
        queue.create(config)
    except (OSError, sqlite3.Error) as error:
        return f"MODEL_JOBS_DIR is {config.directory}; it can't be used: {error}"
    return None
