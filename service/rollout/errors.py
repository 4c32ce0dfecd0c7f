"""Faults that an operator can meet. Each carries a whole sentence, an exit status and an outcome for the audit log."""

from __future__ import annotations

import errno
import os


class ApplianceError(Exception):
    """A foreseeable fault; `message` says what failed, the value, and what to do next."""

    exit_status = 1
    outcome = "failed"

    def __init__(self, message: str, **details: object) -> None:
        super().__init__(message)
        self.message = message
        self.details = details


class Refused(ApplianceError):
    """A check said no before anything was changed."""

    outcome = "refused"


class Failed(ApplianceError):
    """Something went wrong on the way; what had been changed was put back."""


class UsageError(ApplianceError):
    """The command line or the configuration names something that doesn't exist."""

    exit_status = 2
    outcome = "refused"


class NotHealthy(ApplianceError):
    """The live colour isn't healthy."""

    exit_status = 3


class LockHeld(ApplianceError):
    """Another command is at work."""

    exit_status = 4
    outcome = "refused"


class NeedsRoot(ApplianceError):
    """The command may not do this as the present user."""

    exit_status = 5
    outcome = "refused"


class Interrupted(BaseException):
    """SIGINT or SIGTERM arrived. Not an `Exception`, so that no handler for faults swallows it."""

    def __init__(self, signal_name: str) -> None:
        super().__init__(signal_name)
        self.signal_name = signal_name


_ADVICE = {
    errno.ENOSPC: "the disk is full: free some space and run the command again",
    errno.EDQUOT: "the disk quota is used up: free some space and run the command again",
    errno.EROFS: "the file system is read-only: look for disk errors in the kernel log",
    errno.EIO: "the disk reported an error: look at the kernel log",
}


def describe_os_error(error: OSError) -> ApplianceError:
    """Turn an `OSError` that nobody expected more precisely into a fault with advice."""
    what = f"{error.filename}: " if error.filename else ""
    text = error.strerror or str(error)
    if error.errno in (errno.EACCES, errno.EPERM) and os.geteuid() != 0:
        return NeedsRoot(f"{what}{text}: run with sudo")
    advice = _ADVICE.get(error.errno or 0)
    return Failed(f"{what}{text}" + (f" ({advice})" if advice else ""))
