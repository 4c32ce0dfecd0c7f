"""One changing command at a time. The kernel frees the lock when its holder dies, however it dies.

So what is left to break is a lock whose holder lives and doesn't move. While a command holds the lock, a thread of it
renews the note in the lock file; a note that grows old tells a holder that was stopped from a busy one. Whether one
that lives is stuck, only a person can say, and end it by force.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rollout import files
from rollout.errors import Failed, LockHeld, Refused
from rollout.text import now, tidy

STALE_SECONDS = 30.0
_BEAT_SECONDS = 2.0
_POLL_SECONDS = 0.1
# What an interrupted command gets to put things back, and then the kernel to end it.
_END_SECONDS = 5.0


class _Note(NamedTuple):
    """Who holds the lock. `started` is in clock ticks since the boot: with `pid` it names a process for good.

    `clock` is the monotonic time of the last beat in seconds, which is the same for all processes and never jumps;
    `beat` is the same moment in UTC, for people.
    """

    pid: int
    started: int
    who: str
    command: str
    since: str
    beat: str
    clock: float

    @property
    def silent_seconds(self) -> float:
        """Time since the last beat."""
        return time.monotonic() - self.clock

    def describe(self) -> str:
        return f"{tidy(self.who, 80)} (pid {self.pid}) runs 'appliance {tidy(self.command, 80)}' since {self.since}"


@contextlib.contextmanager
def exclusive(path: Path, *, who: str, command: str, wait: float = 0.0) -> Iterator[None]:
    """Hold the lock for the length of the block.

    `wait` is the time in seconds to try for. Raises LockHeld with the holder's name, process, command and start.
    """
    files.ensure_directory(path.parent)
    try:
        # Mode 0600: flock needs no more than an open file, and nobody but root should be able to block a rollback.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise Failed(f"the lock file {path} can't be opened: {error.strerror}; remove it if it isn't root's") from error
    try:
        _acquire(descriptor, path, wait)
        pid, since = os.getpid(), now()
        note = _Note(pid, _started(pid) or 0, who, command, since, beat=since, clock=time.monotonic())
        _write(descriptor, note)
        end = threading.Event()
        heart = threading.Thread(target=_beat, args=(descriptor, note, end), daemon=True)
        try:
            heart.start()
            yield
        finally:
            end.set()
            # Only then may the descriptor's number pass on to another file.
            if heart.is_alive():
                heart.join()
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def break_stale(path: Path, seconds: float = STALE_SECONDS, force: bool = False) -> str:
    """End a holder that has shown no sign of life for `seconds`, or any with `force`; returns in words what was done.

    Raises LockHeld where the holder moves, Refused where it isn't known, Failed where it can't be ended, OSError.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return f"nobody holds the lock {path}"
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return f"nobody holds the lock {path}"
    except BlockingIOError:
        note = _read(descriptor)
    finally:
        os.close(descriptor)
    if note is None:
        raise Refused(
            f"the lock {path} is held by a program that left no note in it, so it isn't 'appliance': 'lslocks' names "
            f"it; end it by hand"
        )
    silent = f"its last sign of life was at {note.beat}, {note.silent_seconds:.0f} s ago"
    if note.silent_seconds < seconds and not force:
        raise LockHeld(
            f"{note.describe()}; {silent}: wait for it. After {seconds:g} s without one it counts as stopped; where it "
            f"hangs although it lives, --force ends it now"
        )
    how = _end(note)
    return f"{note.describe()}; {silent}: {how}, so the lock is free; 'appliance status' says how things are"


def _end(note: _Note) -> str:
    """End the process of a note; returns how."""
    try:
        process = os.pidfd_open(note.pid)
    except ProcessLookupError:
        return "it has ended by itself"
    try:
        # Held by a descriptor, the process keeps its identity: the number alone could be another's by now.
        if _started(note.pid) != note.started:
            return "it has ended by itself"
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(process, number)
                # A stopped process heeds SIGTERM only when it goes on.
                signal.pidfd_send_signal(process, signal.SIGCONT)
            if select.select([process], [], [], _END_SECONDS)[0]:
                return f"ended with {number.name}"
    finally:
        os.close(process)
    raise Failed(
        f"{note.describe()}; it doesn't end even on SIGKILL, so it hangs in the kernel: look in 'dmesg' for a disk "
        f"that doesn't answer; a restart of the host frees the lock"
    )


def _acquire(descriptor: int, path: Path, wait: float) -> None:
    if not files.lock_within(descriptor, wait, _POLL_SECONDS):
        raise LockHeld(_held(descriptor, path, wait))


def _held(descriptor: int, path: Path, wait: float) -> str:
    note = _read(descriptor)
    # Without one, the holder hasn't written its note yet, or somebody else's program holds the lock.
    holder = note.describe() if note else "another process"
    advice = "run this again once it has ended; 'appliance' waits for it with --lock-wait SECONDS"
    if note and note.silent_seconds >= STALE_SECONDS:
        advice = f"no sign of life from it for {note.silent_seconds:.0f} s: 'appliance unlock' ends it"
    after = f" after waiting {wait:g} s" if wait else ""
    return f"the lock {path} is held{after}: {holder}; {advice}"


def _beat(descriptor: int, note: _Note, end: threading.Event) -> None:
    while not end.wait(_BEAT_SECONDS):
        _write(descriptor, note._replace(beat=now(), clock=time.monotonic()))


def _write(descriptor: int, note: _Note) -> None:
    # For messages and `break_stale` only: a full disk must not stand in the way of a rollback.
    with contextlib.suppress(OSError):
        # In one piece over the last one, of which nothing is left but what lies behind the end of the line.
        os.pwrite(descriptor, json.dumps(note._asdict()).encode() + b"\n", 0)


def _read(descriptor: int) -> _Note | None:
    """The note of the process that holds the lock, or None where there is none or its process has ended."""
    try:
        note = _Note(**json.loads(os.pread(descriptor, 4096, 0).partition(b"\n")[0]))
        return note if _started(note.pid) == note.started else None
    except (OSError, ValueError, TypeError):
        return None


def _started(pid: int) -> int | None:
    """When a process was started, in clock ticks since the boot; None where there is no such process."""
    try:
        # The name, the second field, may hold anything but ends with the last parenthesis; the time is the 22nd.
        return int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None
