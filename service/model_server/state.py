"""What the parent, the workers and the control process know of each other."""

import mmap
import time
from enum import IntEnum


class Phase(IntEnum):
    """Where the container is in its life, as the parent sees it."""

    STARTING = 0
    SERVING = 1
    DRAINING = 2


class SharedState:
    """Counters in anonymous memory that survives forks.

    Each cell is an aligned 64-bit integer with one writer at a time, so no lock is needed, and a process that is
    killed can't leave one locked.
    """

    _PHASE, _RESTARTS, _LOADED, _JOB, _FIRST_WORKER = 0, 1, 2, 3, 4
    # For each worker: ready, the start of the prediction that runs, the last turn of its server's loop.
    _FIELDS = 3

    def __init__(self, workers: int) -> None:
        self.wanted = workers
        memory = mmap.mmap(-1, 8 * (self._FIRST_WORKER + self._FIELDS * workers))
        self._cells = memoryview(memory).cast("q")

    @property
    def phase(self) -> Phase:
        """Written by the parent alone."""
        return Phase(self._cells[self._PHASE])

    @phase.setter
    def phase(self, phase: Phase) -> None:
        self._cells[self._PHASE] = phase

    @property
    def restarts(self) -> int:
        """How many workers were replaced since the container started."""
        return self._cells[self._RESTARTS]

    def count_restart(self) -> None:
        """Called by the parent alone."""
        self._cells[self._RESTARTS] += 1

    @property
    def loaded(self) -> float | None:
        """When the models had been loaded, in seconds since the epoch, or None; written by the parent alone."""
        return self._cells[self._LOADED] / 1e9 or None

    def set_loaded(self) -> None:
        """Called by the parent, now that they have."""
        self._cells[self._LOADED] = time.time_ns()

    def set_job_running(self, running: bool) -> None:
        """Called by the process for jobs around each of them, and by the parent once that process is dead."""
        self._cells[self._JOB] = time.monotonic_ns() if running else 0

    @property
    def job_seconds(self) -> float:
        """How long the job has run that the process for jobs is at; 0 where there is none."""
        return self._age(self._JOB)

    @property
    def ready(self) -> int:
        """How many workers have proved that they can predict."""
        return sum(self._cells[self._worker(index)] for index in range(self.wanted))

    def set_ready(self, index: int) -> None:
        """Called by worker ``index``."""
        self._cells[self._worker(index)] = 1

    def set_busy(self, index: int, busy: bool) -> None:
        """Called by worker ``index`` around each batch of its model thread."""
        self._cells[self._worker(index) + 1] = time.monotonic_ns() if busy else 0

    def beat(self, index: int) -> None:
        """Called by worker ``index`` at each turn of its server's loop."""
        self._cells[self._worker(index) + 2] = time.monotonic_ns()

    def busy_seconds(self, index: int) -> float:
        """How long the prediction has run that worker ``index`` is at; 0 where there is none."""
        return self._age(self._worker(index) + 1)

    def silent_seconds(self, index: int) -> float:
        """How long ago worker ``index`` has given a sign of life; 0 before the first."""
        return self._age(self._worker(index) + 2)

    def clear(self, index: int) -> None:
        """Called by the parent once worker ``index`` is dead."""
        first = self._worker(index)
        for cell in range(first, first + self._FIELDS):
            self._cells[cell] = 0

    def _worker(self, index: int) -> int:
        return self._FIRST_WORKER + self._FIELDS * index

    def _age(self, cell: int) -> float:
        since = self._cells[cell]
        return (time.monotonic_ns() - since) / 1e9 if since else 0.0
