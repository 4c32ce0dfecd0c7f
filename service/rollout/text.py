"""Times and strings as the engine writes them."""

from __future__ import annotations

import time
from typing import Any


def now() -> str:
    """The present time in UTC, RFC 3339, whole seconds."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())


def tidy(value: Any, limit: int = 500) -> str:
    """Make a string that came from outside fit for a terminal and a log: one line, printable, at most `limit` long.

    Health answers and journal lines are written by model code, which must not be able to drive a terminal.
    """
    line = "".join(c if c.isprintable() else " " for c in str(value))
    line = " ".join(line.split())
    return line if len(line) <= limit else line[: limit - 1] + "…"
