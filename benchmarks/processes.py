"""A server under measurement: started in a session of its own, its CPU and memory read from /proc, ended with it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import BenchError, reason

_TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
_STOP_SECONDS = 15.0


@dataclass(frozen=True)
class Sample:
    """One process as /proc shows it; `seconds` is the CPU time, user and system, that it has used so far."""

    pid: int
    parent: int
    session: int
    seconds: float


def parse_stat(text: str) -> Sample | None:
    """A process from `/proc/PID/stat`, None for one that has ended. The name in it may hold spaces and brackets."""
    head, _, tail = text.rpartition(")")
    fields = tail.split()
    if fields[0] in "ZX":
        return None
    ticks = int(fields[11]) + int(fields[12])
    return Sample(int(head.split(" ", 1)[0]), int(fields[1]), int(fields[3]), ticks / _TICKS_PER_SECOND)


def family(samples: Sequence[Sample], leader: int) -> list[Sample]:
    """The processes of the leader's session and everything that descends from them, also into other sessions."""
    members = {sample.pid for sample in samples if sample.pid == leader or sample.session == leader}
    while True:
        more = {sample.pid for sample in samples if sample.parent in members} - members
        if not more:
            return [sample for sample in samples if sample.pid in members]
        members |= more


def cpu_between(before: Sequence[Sample], after: Sequence[Sample]) -> float:
    """Seconds of CPU used between two looks at a family; a process that came in between counts from its start."""
    earlier = {sample.pid: sample.seconds for sample in before}
    return sum(sample.seconds - earlier.get(sample.pid, 0.0) for sample in after)


def parse_pss(text: str) -> float:
    """MiB of PSS from `/proc/PID/smaps_rollup`."""
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("Pss:")) / 1024


class Process:
    """A running command with all that it starts. Its output goes to a file `log`, as it would in production."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], folder: Path, log: Path) -> None:
        self._log = log
        self.started = time.monotonic()
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                cwd=folder,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def samples(self) -> list[Sample]:
        """Its processes, now."""
        return family(_everything(), self._process.pid)

    def pss(self) -> float:
        """MiB, pages that processes share counted once."""
        total = 0.0
        for sample in self.samples():
            try:
                total += parse_pss(Path(f"/proc/{sample.pid}/smaps_rollup").read_text())
            except (FileNotFoundError, ProcessLookupError, StopIteration):
                continue
        return total

    def check(self) -> None:
        """Raise BenchError where it has ended."""
        if (status := self._process.poll()) is not None:
            raise BenchError(f"ended with exit status {status}: {reason(self.output())}")

    def output(self) -> str:
        """What it has printed so far."""
        return self._log.read_text(errors="replace")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Take its processes off the cores for a while: some servers keep them busy without a request, too."""
        members = self.samples()
        try:
            for sample in members:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(sample.pid, signal.SIGSTOP)
            yield
        finally:
            for sample in members:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(sample.pid, signal.SIGCONT)

    def stop(self) -> None:
        """End it: politely first, then what is still there is killed."""
        members = {sample.pid for sample in self.samples()}
        self._process.poll()
        # The whole group: some launchers end without telling what they have started.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        deadline = time.monotonic() + _STOP_SECONDS
        while left := {sample.pid for sample in _everything()} & members:
            self._process.poll()
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        for pid in left | {sample.pid for sample in self.samples()}:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._process.wait()


def _everything() -> list[Sample]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        # It may end in the meantime.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            found.append(parse_stat(path.read_text()))
    return [sample for sample in found if sample is not None]
