"""Power cuts: a process that ends at any one of the calls that change the file system, and what is durable by then."""

from __future__ import annotations

import os

CALLS = ("open", "write", "fsync", "close", "mkdir", "chmod", "fchmod", "rename", "symlink", "unlink", "rmdir")
DIED = 77


def in_child(function, die_at, before):
    """Run `function` in a child that ends at its `die_at`-th call, before or after it. Returns the exit status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    count = 0

    def wrap(real):
        def call(*arguments, **options):
            nonlocal count
            count += 1
            dies = count == die_at
            if before and dies:
                os._exit(DIED)
            try:
                return real(*arguments, **options)
            finally:
                # Also after a call that failed, for some may.
                if dies:
                    os._exit(DIED)

        return call

    status = 1
    try:
        for name in CALLS:
            setattr(os, name, wrap(getattr(os, name)))
        function()
        status = 0
    finally:
        os._exit(status)


def record(monkeypatch):
    """A list that grows by ("fsync", path) and ("rename", new path), in the order of the calls."""
    log, paths = [], {}
    real_open, real_fsync, real_rename = os.open, os.fsync, os.rename

    def opened(path, *rest, **options):
        descriptor = real_open(path, *rest, **options)
        paths[descriptor] = str(path)
        return descriptor

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "fsync", lambda d: (log.append(("fsync", paths[d])), real_fsync(d)))
    monkeypatch.setattr(os, "rename", lambda a, b: (log.append(("rename", str(b))), real_rename(a, b)))
    return log
