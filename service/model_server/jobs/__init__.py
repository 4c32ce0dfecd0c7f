"""Jobs: predictions that are asked for now and fetched later.

``store`` keeps them in SQLite, ``queue`` says which comes next, ``consumer`` runs them in a process of its own.
"""

import sqlite3

from model_server.config import JobsConfig
from model_server.jobs import queue, store
from model_server.logs import Log


def prepare(config: JobsConfig, log: Log) -> bool:
    """Make the file where it is missing; False, and a line in the log, where it can't be used."""
    try:
        store.create(config)
        queue.create(config)
    except (OSError, sqlite3.Error) as error:
        log.error("jobs_unavailable", f"MODEL_JOBS_DIR is {config.directory}; it can't be used: {error}")
        return False
    return True
