"""`audit.jsonl`: one JSON object for each thing that the engine did or refused."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

from rollout import files


def append(path: Path, entry: dict[str, Any]) -> None:
    """Add one entry durably. A last line that a crash tore is closed first, so that it spoils no other.

    Raises OSError.
    """
    files.ensure_directory(path.parent)
    created = not path.exists()
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        line = json.dumps(entry, ensure_ascii=False).encode() + b"\n"
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line
        if created:
            os.fchmod(descriptor, 0o644)
        # One write: with O_APPEND the kernel keeps lines of two writers apart.
        if os.write(descriptor, line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)
    if created:
        files.fsync_directory(path.parent)


def read(path: Path, last: int | None = None) -> list[dict[str, Any]]:
    """The last `last` entries (all where None), oldest first. Lines that aren't whole are left out."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    entries = []
    for line in content.split(b"\n"):
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            entries.append(entry)
    return entries if last is None else entries[max(0, len(entries) - last) :]


def has_switched(entry: dict[str, Any]) -> bool:
    """Whether an entry is that of a command which changed the live colour."""
    # A command that was refused did nothing: what changed meanwhile was another's doing.
    after = entry.get("live_after")
    return entry.get("outcome") in ("done", "failed") and after is not None and after != entry.get("live_before")
