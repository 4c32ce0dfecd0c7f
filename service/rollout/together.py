"""Doing several things at the same time that only wait for others."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any


def together(tasks: Sequence[Callable[[], Any]], most: int) -> list[Any]:
    """Call all `tasks`, at most `most` at a time. Returns what each returned, or the Exception that it raised.

    The caller's thread takes part, so that a signal's exception reaches it at once; then no further task begins.
    """
    left = deque(enumerate(tasks))
    outcomes: list[Any] = [None] * len(tasks)

    def work() -> None:
        while True:
            try:
                number, task = left.popleft()
            except IndexError:
                return
            try:
                outcomes[number] = task()
            except Exception as fault:
                outcomes[number] = fault

    # As daemons: what still waits for somebody must not keep a process that has been told to end.
    helpers = [threading.Thread(target=work, daemon=True) for _ in range(min(most, len(tasks)) - 1)]
    try:
        for helper in helpers:
            helper.start()
        work()
        for helper in helpers:
            helper.join()
    finally:
        left.clear()
    return outcomes
