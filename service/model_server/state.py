"""What the parent, the workers and the control process know of each other."""

import mmap
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

    _PHASE, _RESTARTS, _FIRST_WORKER = 0, 1, 2

    def __init__(self, workers: int) -> None:
        self.wanted = workers
        memory = mmap.mmap(-1, 8 * (self._FIRST_WORKER + workers))
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
    def ready(self) -> int:
        """How many workers have proved that they can predict."""
        return sum(self._cells[self._FIRST_WORKER :])

    def set_ready(self, index: int, ready: bool) -> None:
        """Called with True by worker ``index``, with False by the parent once that worker is dead."""
        self._cells[self._FIRST_WORKER + index] = int(ready)
