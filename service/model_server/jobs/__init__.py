"""Jobs: predictions that are asked for now and fetched later.

``store`` keeps them in SQLite, ``queue`` says which comes next, ``consumer`` runs them in a process of its own.
"""

from model_server.config import JobsConfig
from model_server.jobs import queue, store


def create(config: JobsConfig) -> None:
    """Make the file where it is missing. Raises OSError or sqlite3.Error where it can't be used."""
    store.create(config)
    queue.create(config)
