"""One changing command at a time. The kernel frees the lock when its holder dies, however it dies."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

from rollout import files
from rollout.errors import Failed, LockHeld
from rollout.text import now, tidy

_POLL_SECONDS = 0.1


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
        holder = {"pid": os.getpid(), "who": who, "command": command, "since": now()}
        # The note is for the message only; a full disk must not stand in the way of a rollback.
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(holder).encode() + b"\n", 0)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def _acquire(descriptor: int, path: Path, wait: float) -> None:
    deadline = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            left = deadline - time.monotonic()
            if left <= 0:
                raise LockHeld(_held(descriptor, path, wait)) from None
            time.sleep(min(_POLL_SECONDS, left))


def _held(descriptor: int, path: Path, wait: float) -> str:
    after = f" after waiting {wait:g} s" if wait else ""
    advice = "wait for it, or give --lock-wait SECONDS"
    try:
        note = json.loads(os.pread(descriptor, 4096, 0))
        holder = (
            f"{tidy(note['who'], 80)} (pid {int(note['pid'])}) runs 'appliance {tidy(note['command'], 80)}' "
            f"since {tidy(note['since'], 40)}"
        )
    except (OSError, ValueError, KeyError, TypeError):
        # The holder has the lock but hasn't written its note yet, or somebody else's program holds it.
        holder = "another process"
    return f"the lock {path} is held{after}: {holder}; {advice}"
