"""Writing files so that a crash or a power cut leaves either the old or the new content.

All functions raise `OSError` with `filename` set. Modes are set explicitly: nginx's workers and other users read what
is written here, whatever umask the caller has.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import stat
import time
from pathlib import Path


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_directory(path: Path, mode: int = 0o755) -> None:
    """Create one directory with exactly `mode`."""
    os.mkdir(path, mode)
    os.chmod(path, mode)


def ensure_directory(path: Path, mode: int = 0o755) -> None:
    """Create a directory and its parents where they are missing, durably; leave existing ones alone."""
    if path.is_dir():
        return
    ensure_directory(path.parent, mode)
    with contextlib.suppress(FileExistsError):
        make_directory(path, mode)
    fsync_directory(path.parent)


def write_new(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Create a file that doesn't exist yet and make its content durable. The caller makes the name durable."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        os.fchmod(descriptor, mode)
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        os.close(descriptor)


def replace(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Give a file new content in one step. The caller holds the lock, so the temporary name is nobody else's."""
    temporary = path.parent / f".{path.name}.new"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    try:
        write_new(temporary, content, mode)
        os.rename(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    fsync_directory(path.parent)


def remove(path: Path) -> None:
    """Remove a file durably; nothing happens where it doesn't exist."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
        fsync_directory(path.parent)


def remove_tree(path: Path) -> None:
    """Remove a directory or a link. What can't be removed stays for the next time: it is never more than rubbish."""
    import shutil

    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.unlink(path)


def read_untrusted(path: Path, limit: int = 65536) -> bytes | None:
    """Read a small regular file in a directory where model code may write; None where there is no such file.

    A link there could lead root to any file on the host, and a FIFO would block for ever: neither is opened as such.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            return None
        return os.read(descriptor, limit)
    except OSError:
        return None
    finally:
        os.close(descriptor)


def lock_within(descriptor: int, seconds: float, poll_seconds: float) -> bool:
    """Lock an open file or directory for this process alone; False where somebody else still has it after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            # flock itself knows no limit of time, and an alarm would belong to the whole process.
            time.sleep(min(poll_seconds, left))
