"""Waiting until a colour that gets no more requests has answered those that it has."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from rollout.colour import Colour, Unreachable
from rollout.errors import NeedsRoot
from rollout.text import tidy
from rollout.unixhttp import ExchangeError, UnixConnection, exchange

_POLL_SECONDS = 0.2
_ANSWER_SECONDS = 5.0
# Requests that wait for the model count as in progress too, so that `model_queue_depth` would count them twice.
_GAUGE = re.compile(r"^model_requests_in_progress(?:\{.*\})? (\S+)$", re.MULTILINE)


@dataclass(frozen=True)
class Drained:
    """How a drain ended: requests still in progress, and the time that it took in seconds.

    `note` says why a colour counts as drained that couldn't be asked.
    """

    left: int
    seconds: float
    note: str | None = None


def drain(
    colour: Colour, deadline_seconds: float, progress: Callable[[str], None], between: Callable[[], None]
) -> Drained:
    """Wait until no request is in progress, at two looks in a row, or `deadline_seconds` are over.

    `between` is called before each look and may raise. Where nothing answers, nothing is in progress. What nginx is
    still receiving for the colour, a slow upload from before the switch, isn't in the colour's gauge yet. Raises
    NeedsRoot.
    """
    started = time.monotonic()
    quiet, said = 0, 0
    while True:
        between()
        try:
            left, note = _in_progress(colour), None
        except Unreachable as fault:
            left, note = 0, fault.message
        quiet = 0 if left else quiet + 1
        seconds = time.monotonic() - started
        if quiet == 2 or seconds >= deadline_seconds:
            return Drained(left, round(seconds, 3), note)
        if left != said:
            progress(f"{colour.name}: requests in progress: {left}")
            said = left
        time.sleep(min(_POLL_SECONDS, deadline_seconds - seconds))


def _in_progress(colour: Colour) -> int:
    """The requests of all models of a colour that aren't answered. Raises Unreachable, NeedsRoot."""
    path = colour.directory / "control.sock"
    connection = UnixConnection(path, _ANSWER_SECONDS)
    try:
        answer = exchange(connection, "GET", "/metrics", timeout=_ANSWER_SECONDS)
        if answer.status != 200:
            raise ExchangeError(f"/metrics answers {answer.status}")
        # No such line, no worker.
        return max(0, round(sum(float(value) for value in _GAUGE.findall(answer.body.decode(errors="replace")))))
    except PermissionError:
        raise NeedsRoot(f"{path} may not be used by this user: run with sudo") from None
    except (ExchangeError, ValueError, OverflowError) as error:
        raise Unreachable(f"{colour.name} doesn't answer on {path}: {tidy(error)}") from None
    finally:
        connection.close()
