"""SIGINT and SIGTERM: at once while waiting, never between two steps that belong together."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any

from rollout.errors import Interrupted


class Interrupts:
    """While entered, a signal raises `Interrupted` once, outside of `hold` sections, until `disarm`.

    SIGHUP is ignored: a command that has begun ends safely by itself when the operator's connection dies.
    """

    def __init__(self) -> None:
        self._depth = 0
        self._pending: str | None = None
        self._spent = False
        self._earlier: dict[int, Any] = {}

    def __enter__(self) -> Interrupts:
        # Python only lets the main thread set handlers; anywhere else there is nothing to protect against.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._earlier[number] = signal.signal(number, self._on_signal)
            self._earlier[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)
        self._earlier.clear()

    def _on_signal(self, number: int, _frame: object) -> None:
        # Only the first signal raises: a second one must not break off the clean-up that the first one started.
        if self._spent:
            return
        if self._depth:
            self._pending = signal.Signals(number).name
            return
        self._spent = True
        raise Interrupted(signal.Signals(number).name)

    def check(self) -> None:
        """Inside a `hold` section: a place where a signal that came in the meantime may raise."""
        if self._pending and not self._spent:
            self._spent = True
            raise Interrupted(self._pending)

    def disarm(self) -> None:
        """From here on the result stands: no signal raises any more."""
        self._spent = True

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Put signals off until the end of the section."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
        if self._depth == 0:
            self.check()
