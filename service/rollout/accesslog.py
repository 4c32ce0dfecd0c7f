"""nginx's access log as it grows: what clients got, by the colour that nginx had chosen."""

from __future__ import annotations

import datetime
import json
import os
import random
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from rollout import compare
from rollout.judge import Window

# TorchServe's clients may send theirs with PUT.
_PREDICTING = ("POST", "PUT")
_CLIENT_GONE = 499
# Client errors that are no answer to the input: it took too long, there were too many, or the client went away.
NOT_OF_THE_INPUT = (408, 429, _CLIENT_GONE)
# More say nothing new about a second.
_MOST_TIMES = 500
_MOST_BYTES_PER_READ = 64 * 1024 * 1024
_MOST_BYTES_BACK = 4 * 1024 * 1024


@dataclass(frozen=True)
class _Request:
    """A prediction that was answered; `seconds` is the time that the colour took."""

    time: str
    request_id: str
    colour: str
    status: int
    seconds: float


@dataclass
class _Second:
    """What was read at one time, by colour: the requests of clients, and those that the engine sent itself."""

    at: float
    clients: dict[str, Window] = field(default_factory=dict)
    own: dict[str, Window] = field(default_factory=dict)


class AccessLog:
    """The requests of the last `keep_seconds`, for each colour, of which those whose id begins with `mark` are our own.

    Others that begin with `engine` are left out. Times are those of the reading, since the clock of the log may jump.
    """

    def __init__(self, path: Path, mark: str, engine: str, keep_seconds: float) -> None:
        self._path = path
        self._mark = mark
        self._engine = engine
        self._keep = keep_seconds
        self._seconds: deque[_Second] = deque()
        self._rest = b""
        self._stream = self._open()
        if self._stream is not None:
            self._stream.seek(0, os.SEEK_END)

    def _open(self):
        self._rest = b""
        try:
            return self._path.open("rb", buffering=0)
        except OSError:
            # Rotation renames the file before nginx makes a new one.
            return None

    def close(self) -> None:
        """Close the file."""
        if self._stream is not None:
            self._stream.close()

    def read(self) -> None:
        """Take in what was written since the last time. Raises OSError."""
        second = _Second(time.monotonic())
        if self._stream is None:
            self._stream = self._open()
        if self._stream is not None:
            if os.fstat(self._stream.fileno()).st_size < self._stream.tell():
                self._stream.seek(0)
            rotated = self._rotated()
            self._take(second)
            if rotated:
                self._stream.close()
                self._stream = self._open()
                self._take(second)
        self._seconds.append(second)
        while self._seconds[0].at < second.at - self._keep:
            self._seconds.popleft()

    def _rotated(self) -> bool:
        try:
            return not os.path.samestat(os.stat(self._path), os.fstat(self._stream.fileno()))
        except FileNotFoundError:
            return False

    def _take(self, second: _Second) -> None:
        if self._stream is None:
            return
        *lines, self._rest = (self._rest + self._stream.read(_MOST_BYTES_PER_READ)).split(b"\n")
        for line in lines:
            request = _parse(line)
            if request is not None:
                mine = request.request_id.startswith(self._mark)
                if mine or not request.request_id.startswith(self._engine):
                    windows = second.own if mine else second.clients
                    _add(windows.setdefault(request.colour, Window()), request)

    def clients(self, colour: str, since: float) -> Window:
        """What clients got from `colour` since the monotonic time `since` in seconds."""
        return _sum(second.clients.get(colour) for second in self._seconds if second.at >= since)

    def own(self, colour: str, since: float) -> Window:
        """What the engine's own requests got from `colour` since the monotonic time `since` in seconds."""
        return _sum(second.own.get(colour) for second in self._seconds if second.at >= since)


def before(path: Path, colour: str, seconds: float, *own: str, not_before: str | None = None) -> Window:
    """What clients got from `colour` within the last `seconds`, from what the log holds already.

    Nothing counts from before `not_before`, a time in ISO 8601. The ids of the engine's own requests begin with one
    of `own`.
    """
    window = Window()
    earliest = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=seconds)
    if not_before is not None:
        earliest = max(earliest, _moment(not_before))
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, stream.seek(0, os.SEEK_END) - _MOST_BYTES_BACK))
            lines = stream.read(_MOST_BYTES_BACK).split(b"\n")
    except OSError:
        return window
    for line in lines:
        request = _parse(line)
        mine = request is not None and request.request_id.startswith(own)
        if request is not None and not mine and request.colour == colour and _moment(request.time) >= earliest:
            _add(window, request)
    return window


def _parse(line: bytes) -> _Request | None:
    """A prediction, or None for anything else, a torn line included."""
    try:
        entry = json.loads(line)
        if entry["method"] not in _PREDICTING:
            return None
        # nginx gives one time for each worker that it tried. The whole request's time would count a slow client, too.
        tried = [float(part) for part in entry["upstream_seconds"].replace(":", ",").split(",") if part.strip(" -")]
        seconds = sum(tried) if tried else float(entry["request_seconds"])
        status = int(entry["status"])
        if status == 503 and not tried:
            # nginx's own, in maintenance: no colour was asked.
            return None
        refused = 400 <= status < 500 and status != _CLIENT_GONE
        if refused and compare.prediction(entry["method"], entry["path"]) is None:
            # What no release serves, asked for by a scanner or an outdated client, says nothing about this one.
            return None
        return _Request(entry["time"], entry["request_id"], entry["routed"], status, seconds)
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _moment(text: str) -> datetime.datetime:
    try:
        return datetime.datetime.fromisoformat(text)
    except ValueError:
        return datetime.datetime.min.replace(tzinfo=datetime.UTC)


def _add(window: Window, request: _Request) -> None:
    if request.status == _CLIENT_GONE:
        if len(window.gone) < _MOST_TIMES:
            window.gone.append(request.seconds)
        return
    window.requests += 1
    if request.status >= 500:
        window.errors += 1
    elif request.status >= 400:
        window.refused += request.status not in NOT_OF_THE_INPUT
    elif len(window.seconds) < _MOST_TIMES:
        window.seconds.append(request.seconds)
    else:
        # A fair sample of all, however many come.
        place = random.randrange(window.requests)
        if place < _MOST_TIMES:
            window.seconds[place] = request.seconds


def _sum(windows: Iterable[Window | None]) -> Window:
    total = Window()
    for window in windows:
        if window is not None:
            total.requests += window.requests
            total.errors += window.errors
            total.refused += window.refused
            total.seconds += window.seconds
            total.gone += window.gone
    return total
