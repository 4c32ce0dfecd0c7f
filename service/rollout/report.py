"""What the engine prints: progress to standard error, the result to standard output."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

_COLUMNS = ("colour", "role", "status", "release", "model", "version", "workers", "unit", "reason")


class Result:
    """The end of a command. `details` are further keys of its JSON object; `lines` are for people.

    `lines` follow the message, or replace it where `headline` is false.
    """

    def __init__(
        self,
        message: str,
        *,
        ok: bool = True,
        changed: bool = False,
        outcome: str = "done",
        exit_status: int = 0,
        details: dict[str, Any] | None = None,
        lines: list[str] | None = None,
        headline: bool = True,
    ) -> None:
        self.message = message
        self.ok = ok
        self.changed = changed
        self.outcome = outcome
        self.exit_status = exit_status
        self.details = {} if details is None else details
        self.lines = [] if lines is None else lines
        self.headline = headline

    def as_json(self) -> str:
        """One line of JSON."""
        about = {"ok": self.ok, "changed": self.changed, "message": self.message, **self.details}
        return json.dumps(about, ensure_ascii=True)


def progress(text: str) -> None:
    """Tell a watching person what happens. A reader that went away doesn't stop a swap half-way."""
    with contextlib.suppress(OSError, ValueError):
        print(f"appliance: {text}", file=sys.stderr, flush=True)


def print_result(result: Result, as_json: bool) -> bool:
    """Print the result, and say whether it could be; a fault goes to standard error unless JSON is wanted."""
    with contextlib.suppress(OSError, ValueError):
        if as_json:
            print(result.as_json(), flush=True)
        elif result.exit_status in (0, 3):
            headline = [result.message] if result.headline or not result.lines else []
            print("\n".join(headline + result.lines), flush=True)
        else:
            print(f"appliance: {result.message}", file=sys.stderr, flush=True)
        return True
    return False


def status_table(colours: dict[str, dict[str, Any]], live: str | None) -> list[str]:
    """The colours as an aligned table."""
    rows = [[column.upper() for column in _COLUMNS]]
    for name, about in colours.items():
        workers = about["workers"]
        row = dict(about, colour=name, role="live" if name == live else "idle")
        row["workers"] = f"{workers['ready']}/{workers['wanted']}" if workers else None
        rows.append(["-" if row[column] is None else str(row[column]) for column in _COLUMNS])
    widths = [max(len(row[i]) for row in rows) for i in range(len(_COLUMNS))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def history_lines(entries: list[dict[str, Any]]) -> list[str]:
    """One line for each audit entry."""
    lines = []
    for entry in entries:
        time, command, outcome, who = (str(entry.get(key) or "-") for key in ("time", "command", "outcome", "who"))
        reason = f" [{entry['reason']}]" if entry.get("reason") else ""
        lines.append(f"{time:20}  {command:14}  {outcome:8}  {who:10}  {entry.get('message') or '-'}{reason}")
    return lines
