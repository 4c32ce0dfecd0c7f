"""Power cuts: a process that ends at any one of the calls that change the file system, and what is durable by then."""

from __future__ import annotations

import collections
import itertools
import os
import shutil

from rollout import host

CALLS = ("open", "write", "fsync", "close", "mkdir", "chmod", "fchmod", "rename", "link", "symlink", "unlink", "rmdir")
# What systemctl changes.
ORDERS = ("start", "restart", "stop", "enable")
DIED = 77
ENOUGH_LINKS = 2


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


def cuts(function, again):
    """Yield for each cut in `function`, the last of which is at its end; `again` puts everything back before each.

    Cuts are before each call that changes the file system or has systemd change something, and in the midst of each
    write: between those nothing is changed that another process could see. Of the links of one directory, of which a
    share has a hundred, the first two are enough: the rest make what nobody can see longer.
    """
    for number in itertools.count(1):
        again()
        status = _until_cut(function, number)
        assert status in (0, DIED), (number, status)
        yield number
        if status == 0:
            return


def _until_cut(function, number):
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    moments, linked = itertools.count(1), collections.Counter()

    def moment():
        if next(moments) == number:
            os._exit(DIED)

    def wrap(name, real):
        def call(*arguments, **options):
            directory = os.path.dirname(arguments[1]) if name == "link" else None
            linked[directory] += name == "link"
            if linked[directory] <= ENOUGH_LINKS and _changes(name, arguments, options):
                moment()
            if name == "write" and len(arguments[1]) > 1 and next(moments) == number:
                real(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                os._exit(DIED)
            return real(*arguments, **options)

        return call

    def ordered(real):
        def call(command, *more):
            if command[1] in ORDERS:
                moment()
            return real(command, *more)

        return call

    status = 1
    try:
        for name in CALLS:
            setattr(os, name, wrap(name, getattr(os, name)))
        host.run = ordered(host.run)
        function()
        status = 0
    finally:
        os._exit(status)


def _changes(name, arguments, options):
    if name == "open":
        makes = arguments[1] & (os.O_CREAT | os.O_TRUNC)
        return makes and (options.get("dir_fd") is not None or not os.path.lexists(arguments[0]))
    return name not in ("fsync", "close")


class Saved:
    """What a box has on its disk, but for the bundles, which nothing changes."""

    def __init__(self, box):
        self._box, self._copy = box, box.root / "saved"
        shutil.rmtree(self._copy, ignore_errors=True)
        for directory in (box.state_dir, box.config_dir):
            shutil.copytree(directory, self._copy / directory.name, symlinks=True, ignore=self._ignore)

    def _ignore(self, directory, _names):
        return ["bundles"] if directory == str(self._box.state_dir) else []

    def put_back(self):
        """Make the disk what it was."""
        for directory in (self._box.state_dir, self._box.config_dir):
            for path in directory.iterdir():
                if path.name != "bundles":
                    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            shutil.copytree(self._copy / directory.name, directory, symlinks=True, dirs_exist_ok=True)


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
