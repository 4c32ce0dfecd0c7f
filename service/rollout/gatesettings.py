"""The gate's settings: the load of its test, and what a colour must reach under it."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

from rollout.errors import UsageError

THINK_SECONDS = 0.1
"""Mean pause of a user between two requests. Without pauses a load test misses what happens to idle connections."""
_MILLISECONDS = (0, 86_400_000, int | float, "a number of milliseconds from 0 to 86400000")
# Lowest, highest, type, in words.
_NUMBERS = {
    "users": (1, 1000, int, "a whole number from 1 to 1000"),
    "seconds": (1, 3600, int, "a whole number of seconds from 1 to 3600"),
    "min_requests": (1, 1_000_000, int, "a whole number from 1 to 1000000"),
    "min_requests_per_second": (0, 10_000, int | float, "a number from 0 to 10000"),
    "max_error_share": (0, 1, int | float, "a share from 0 to 1"),
    "max_p50_ms": _MILLISECONDS,
    "max_p95_ms": _MILLISECONDS,
    "max_p99_ms": _MILLISECONDS,
}


class Gate(NamedTuple):
    """The load, and what a colour must reach under it. Failed requests count in the quantiles, too."""

    enabled: bool = True
    """Whether releases are load-tested at all; who calls `run` looks at it."""
    users: int = 10
    """Clients at the same time, each with a connection that it holds."""
    seconds: int = 10
    min_requests: int = 50
    """Fewer than this say nothing, which doesn't pass."""
    min_requests_per_second: float = 5
    max_error_share: float = 0
    """Share of requests, 0 to 1, that may end in anything but a good answer."""
    max_p50_ms: float = 500
    max_p95_ms: float = 1000
    max_p99_ms: float = 2000


def parse(where: str, raw: Any) -> Gate:
    """Make a Gate of what a configuration holds; `where` names the place. Raises UsageError."""
    if not isinstance(raw, dict):
        raise UsageError(f"{where} must be a JSON object, not {json.dumps(raw)}")
    known = set(Gate._fields)
    unknown = sorted(raw.keys() - known)
    if unknown:
        raise UsageError(f"{where}: unknown key {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    gate = Gate(**{key: _convert(where, key, value) for key, value in raw.items()})
    for key, most, when in (
        ("min_requests_per_second", gate.users / THINK_SECONDS, "a second"),
        ("min_requests", gate.users * gate.seconds / THINK_SECONDS, f"in {gate.seconds} s"),
    ):
        if getattr(gate, key) > most:
            raise UsageError(
                f"{where}.{key} is {getattr(gate, key):g}, but {gate.users} users with a pause of {THINK_SECONDS:g} s "
                f"can't send more than {most:g} requests {when}: lower it, or raise {where}.users"
            )
    return gate


def _convert(where: str, key: str, value: Any) -> Any:
    def wrong(wanted: str) -> UsageError:
        return UsageError(f"{where}.{key} must be {wanted}, not {json.dumps(value)}")

    if key == "enabled":
        if not isinstance(value, bool):
            raise wrong("true or false")
        return value
    lowest, highest, kind, wanted = _NUMBERS[key]
    if isinstance(value, bool) or not isinstance(value, kind) or not lowest <= value <= highest:
        raise wrong(wanted)
    return value
