"""Why a test was run once more: pytest's summary names it alone, and the second run hides the first one's reason."""

from __future__ import annotations

from typing import Any

_LIMIT = 4000


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print the end of what each test that was run again had failed with, and what was captured."""
    for report in terminalreporter.getreports("rerun"):
        if report.outcome == "rerun":
            terminalreporter.write_sep("-", f"{report.nodeid}: why it was run again")
            for text in (report.longreprtext, *(text for _, text in report.sections)):
                terminalreporter.write_line(text[-_LIMIT:])
