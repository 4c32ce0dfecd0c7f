"""The gate's load test: users who post a bundle's examples in turn, each on a connection that it holds, with pauses.

Locust runs it on the appliance's host, from an environment of its own. It reads these environment variables:

LOADTEST_URL              where to post
LOADTEST_EXAMPLES         the bundle's examples.json
LOADTEST_COLOUR           the colour that must answer
LOADTEST_THINK_SECONDS    mean pause of a user between two requests
LOADTEST_TIMEOUT_SECONDS  time for an answer

When the run ends, it writes one JSON object to standard output: `locust` (version), `start`, `end` (RFC 3339),
`duration_seconds` (until the last request ended), `requests`, `failures`, `errors` (how many failed, by kind), and
`p50_ms`, `p95_ms`, `p99_ms`, `max_ms`, which are null without a request. The quantiles are exact, by nearest rank, and
failed requests count; Locust's own statistics round each time to two digits.
"""

import datetime
import itertools
import json
import os
import time
from array import array
from collections import Counter
from pathlib import Path

import gevent
import locust

URL = os.environ["LOADTEST_URL"]
COLOUR = os.environ["LOADTEST_COLOUR"]
THINK_SECONDS = float(os.environ["LOADTEST_THINK_SECONDS"])
TIMEOUT_SECONDS = float(os.environ["LOADTEST_TIMEOUT_SECONDS"])
EXAMPLES = json.loads(Path(os.environ["LOADTEST_EXAMPLES"]).read_bytes())["examples"]
BODIES = itertools.cycle([json.dumps(example["request"]).encode() for example in EXAMPLES])
HEADERS = {"Content-Type": "application/json"}


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Measurements:
    """What happened to the requests of all users."""

    def __init__(self) -> None:
        self._start = self._end = _now()
        # Durations come from a clock that nobody sets.
        self._began = self._ended = time.monotonic()
        self._milliseconds = array("d")
        self._errors: Counter[str] = Counter()

    def add(self, milliseconds: float, fault: str | None) -> None:
        """One request that has ended."""
        self._end, self._ended = _now(), time.monotonic()
        self._milliseconds.append(milliseconds)
        if fault:
            self._errors[fault] += 1

    def summary(self) -> dict[str, object]:
        """The object that is written in the end."""
        ordered = sorted(self._milliseconds)
        return {
            "locust": locust.__version__,
            "start": self._start,
            "end": self._end,
            "duration_seconds": round(self._ended - self._began, 3),
            "requests": len(ordered),
            "failures": self._errors.total(),
            "errors": dict(self._errors),
            "p50_ms": _percentile(ordered, 50),
            "p95_ms": _percentile(ordered, 95),
            "p99_ms": _percentile(ordered, 99),
            "max_ms": _percentile(ordered, 100),
        }


def _percentile(ordered: list[float], percent: int) -> float | None:
    # The smallest value that at least this share of all values don't exceed; in whole numbers, so that nothing rounds.
    return round(ordered[(percent * len(ordered) + 99) // 100 - 1], 3) if ordered else None


measurements = Measurements()


@locust.events.init.add_listener
def update_clock(**_: object) -> None:
    """Locust has come up, and gevent's clock stood still meanwhile: the run would end that much too early."""
    gevent.get_hub().loop.update_now()


@locust.events.test_start.add_listener
def begin(**_: object) -> None:
    """The users start."""
    global measurements
    measurements = Measurements()


@locust.events.quitting.add_listener
def write_summary(**_: object) -> None:
    """The users have ended, or Locust was told to."""
    print(json.dumps(measurements.summary()), flush=True)


class Client(locust.FastHttpUser):
    """A client that thinks between two requests on the same connection."""

    host = URL
    wait_time = locust.between(0.5 * THINK_SECONDS, 1.5 * THINK_SECONDS)
    network_timeout = connection_timeout = TIMEOUT_SECONDS

    def on_start(self) -> None:
        """Don't all begin in the same instant."""
        self.wait()

    @locust.task
    def predict(self) -> None:
        """Post the next example."""
        sent = time.perf_counter()
        try:
            response = self.client.post(URL, data=next(BODIES), headers=HEADERS, allow_redirects=False)
            fault = _fault(response)
        except Exception as error:
            # What isn't HTTP at all: Locust would count no request.
            fault = _name(error)
        measurements.add((time.perf_counter() - sent) * 1000, fault)


def _fault(response: locust.contrib.fasthttp.FastResponse) -> str | None:
    """What is wrong with an answer, as one of few kinds, or None."""
    if not response.status_code:
        return _name(response.error)
    if response.status_code != 200:
        return f"status {response.status_code}"
    if response.headers.get("X-Model-Colour") != COLOUR:
        return "another colour's answer"
    try:
        json.loads(response.content)
    except ValueError:
        return "not JSON"
    return None


def _name(error: Exception) -> str:
    # geventhttpclient wraps what ended the only attempt.
    return type(getattr(error, "original", None) or error).__name__
