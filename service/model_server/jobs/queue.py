"""Which job comes next: a huey queue for each colour, in the file of the jobs.

huey takes a task out of its queue before it is run, so what a dead process was at is gone from here; the table of jobs
still has it. A job may also be here twice, or though it was canceled: whether it is run is for the table to say.
"""

import json
from collections.abc import Callable
from typing import Any

from huey import SqliteHuey
from huey.api import Task
from huey.registry import Message
from huey.serializer import Serializer
from huey.storage import SqliteStorage

from model_server.config import JobsConfig
from model_server.jobs.store import BUSY_SECONDS


class _Json(Serializer):
    """Not pickle: the code of both colours' models may write to the file, and reading a pickle runs what it holds."""

    def _serialize(self, data: Any) -> bytes:
        return json.dumps(data).encode()

    def _deserialize(self, data: bytes) -> Message:
        return Message(*json.loads(data))


def create(config: JobsConfig) -> None:
    """Make huey's tables where they are missing. Raises sqlite3.Error."""
    SqliteStorage("jobs", filename=str(config.file), timeout=BUSY_SECONDS, fsync=True)


class Queue:
    """The queue of one colour. ``run`` is what its tasks call with a job's id. It connects at its first
    use, which must be after the fork.
    """

    def __init__(self, config: JobsConfig, colour: str, run: Callable[[str], None] | None = None) -> None:
        self._huey = SqliteHuey(
            f"jobs-{colour}",
            filename=str(config.file),
            timeout=BUSY_SECONDS,
            fsync=True,
            results=False,
            serializer=_Json(),
            create_tables=False,
        )

        @self._huey.task(name="job")
        def job(job_id: str) -> None:
            if run is None:
                raise RuntimeError("this process runs no jobs")
            run(job_id)

        self._job = job

    def put(self, *job_ids: str) -> None:
        """Add jobs at the end, in one transaction: each is synced to the disk."""
        storage = self._huey.storage
        tasks = [(storage.name, self._huey.serialize_task(self._job.s(job_id))) for job_id in job_ids]
        with storage.db(commit=True) as cursor:
            cursor.executemany("insert into task (queue, data) values (?, ?)", tasks)

    def take(self) -> Task | None:
        """The next task, or None. Its ``execute`` runs the job."""
        return self._huey.dequeue()

    def is_empty(self) -> bool:
        """Whether no task waits."""
        return self._huey.storage.queue_size() == 0

    def clear(self) -> None:
        """Forget all tasks."""
        self._huey.storage.flush_queue()
