"""Sends copies of requests to both colours and compares what they say.

`rollout.shadow` runs it in processes of their own, `python3 -m rollout.replay CONFIG`, so that reading a long answer
never holds up the one that nginx waits for.

A model that answers the same request differently each time differs from itself too: that can't be told from a
difference between the colours.
"""

from __future__ import annotations

import functools
import json
import os
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from rollout import config
from rollout.compare import Prediction, compare, prediction
from rollout.errors import ApplianceError
from rollout.routing import Routing
from rollout.text import tidy
from rollout.unixhttp import Answer, ExchangeError, UnixConnection, exchange

AGREE, DIFFER, ERROR_LIVE, ERROR_IDLE, SHED = "agree", "differ", "error_live", "error_idle", "shed"
_WORKER = re.compile(r"worker-[0-9]+\.sock")
_MARK = "-shadow"
# What the service takes; it would put an id of its own in the place of a longer one, and refuse a longer time.
_REQUEST_ID_LENGTH = 64
_LONGEST_TIMEOUT_SECONDS = 3600
# Those of nginx and of its connection, and those that a copy gets anew.
_NOT_COPIED = frozenset(("connection", "content-length", "host", "x-request-id", "x-request-timeout", "x-shadow-path"))
# An overloaded colour says so; a copy whose turn came too late was never computed.
_OVERLOADED, _TOO_LATE = 503, 504


@dataclass(frozen=True)
class Copy:
    """A request as a client sent it; header names are in lower case. `turn` counts the copies."""

    turn: int
    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    def dump(self) -> bytes:
        """For the process that compares: a line of JSON and the body."""
        about = {"turn": self.turn, "method": self.method, "path": self.path, "headers": self.headers}
        return json.dumps({**about, "length": len(self.body)}).encode() + b"\n" + self.body

    @classmethod
    def load(cls, stream: BinaryIO) -> Copy | None:
        """The next copy of a stream; None where it ends, be it within a copy."""
        line = stream.readline()
        if not line.endswith(b"\n"):
            return None
        about = json.loads(line)
        length = about.pop("length")
        body = stream.read(length)
        return cls(**about, body=body) if len(body) == length else None


@dataclass(frozen=True)
class Outcome:
    """What came of a copy: `distance` as in `Comparison`; `trouble` says why a colour gave no answer."""

    result: str
    distance: float | None = None
    trouble: str | None = None


class _NoAnswer(Exception):
    """A colour gave no usable answer; the text says why."""


class Replayer:
    """Asks both colours."""

    def __init__(self, settings: config.Config) -> None:
        self._settings = settings
        self._routing = Routing(settings.routing_dir, settings.colours)
        self._is_classifier = functools.lru_cache(maxsize=64)(self._ask_whether_classifier)

    def replay(self, copy: Copy) -> Outcome:
        """Send a copy to both colours, one after the other, and compare what they say."""
        try:
            state = self._routing.read()
        except ApplianceError as fault:
            return Outcome(ERROR_LIVE, trouble=fault.message)
        if state is None:
            return Outcome(ERROR_LIVE, trouble="no colour is live")
        live, idle = state.live, self._settings.other(state.live)
        answers: dict[str, Answer] = {}
        faults: dict[str, str] = {}
        # Whoever comes second may profit from the first: they take turns.
        for colour in (idle, live) if copy.turn % 2 else (live, idle):
            try:
                answers[colour] = self._ask(colour, copy.turn, copy.method, copy.path, copy.body, self._headers(copy))
            except _NoAnswer as fault:
                faults[colour] = f"{colour} gives no answer: {fault}"
        if live in faults:
            return Outcome(ERROR_LIVE, trouble=faults[live])
        if idle in faults:
            return Outcome(ERROR_IDLE, trouble=faults[idle])
        return self._compare(prediction(copy.method, copy.path), live, answers[live], answers[idle])

    def _compare(self, asked: Prediction, live: str, of_live: Answer, of_idle: Answer) -> Outcome:
        if _OVERLOADED in (of_live.status, of_idle.status):
            return Outcome(SHED)
        if of_live.status != of_idle.status:
            return Outcome(DIFFER)
        if of_live.status >= 400:
            return Outcome(AGREE)
        classifier = False
        if asked.hides_classes:
            try:
                classifier = self._is_classifier(live, asked.model, of_live.headers.get("x-model-version"))
            except _NoAnswer as fault:
                return Outcome(ERROR_LIVE, trouble=f"{live} doesn't say what its model answers: {fault}")
        found = compare(of_live, of_idle, asked, classifier=classifier, tolerance=self._settings.shadow_tolerance)
        return Outcome(AGREE if found.agree else DIFFER, found.distance)

    def _headers(self, copy: Copy) -> dict[str, str]:
        request_id = copy.headers.get("x-request-id", "")[: _REQUEST_ID_LENGTH - len(_MARK)]
        return {
            **{name: value for name, value in copy.headers.items() if name not in _NOT_COPIED},
            "x-request-id": request_id + _MARK,
            # The request that it is a copy of counts for the statistics of inputs.
            "x-appliance-probe": "1",
            "x-request-timeout": f"{min(self._settings.request_timeout_seconds, _LONGEST_TIMEOUT_SECONDS):g}",
        }

    def _ask_whether_classifier(self, colour: str, model: str, _version: str | None) -> bool:
        """Whether a model's own outputs are the probabilities of classes. A version never changes: once is enough.

        Raises _NoAnswer.
        """
        answer = self._ask(colour, 0, "GET", f"/v1/model/{model}/bio")
        try:
            output = json.loads(answer.body)["output"]
            # Code of the bundle's own may make anything of the classes: then there is no schema.
            return output["kind"] == "classes" and bool(output["schema"])
        except (ValueError, KeyError, TypeError, RecursionError):
            raise _NoAnswer(f"status {answer.status} without a description of the model") from None

    def _ask(
        self,
        colour: str,
        turn: int,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: dict[str, str] | None = None,
    ) -> Answer:
        """Ask one worker of a colour. Raises _NoAnswer."""
        timeout = self._settings.request_timeout_seconds
        try:
            connection = UnixConnection(self._worker(colour, turn), timeout)
            try:
                answer = exchange(connection, method, path, body, headers, timeout=timeout)
            finally:
                connection.close()
        except ExchangeError as error:
            raise _NoAnswer(tidy(error, 100)) from None
        except OSError as error:
            raise _NoAnswer(error.strerror or type(error).__name__) from None
        except ValueError:
            # A header of the copy would end before its end.
            raise _NoAnswer("the copy can't be sent") from None
        if answer.status == _TOO_LATE:
            raise _NoAnswer(f"the copy's turn didn't come within {timeout:g} s")
        return answer

    def _worker(self, colour: str, turn: int) -> Path:
        directory = self._settings.runtime_dir / colour
        names = sorted(name for name in os.listdir(directory) if _WORKER.fullmatch(name))
        if not names:
            raise _NoAnswer(f"there is no worker's socket in {directory}")
        return directory / names[turn % len(names)]


def main() -> int:
    """Compare the copies on standard input until it ends, with an outcome in JSON as a line of standard output each."""
    # Whoever serves clients comes first.
    os.nice(10)
    replayer = Replayer(config.load(Path(sys.argv[1])))
    while copy := Copy.load(sys.stdin.buffer):
        print(json.dumps(asdict(replayer.replay(copy))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
