#!/usr/bin/env python3
"""A load generator for POST: at a fixed mean rate (open loop), or as fast as answers come (closed loop).

Sends go to the addresses in turn, on kept connections. Prints one line of JSON: counts, and times in ms counted from
when a request was due, so that a request which couldn't be sent in time counts its wait too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import sys
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "load"))

from swap_client import percentile  # noqa: E402

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CLOSE = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)
_RETRY = re.compile(rb"\r\nretry-after: *\d", re.IGNORECASE)
_LAST_ANSWERS_SECONDS = 30.0
# In an open loop, for each address. What is due while all are in use waits.
_MOST_CONNECTIONS = 1000


def due_times(rate: float, seconds: float, seed: int = 0) -> Iterator[float]:
    """When requests are due, in seconds from the start: a Poisson process of `rate` a second."""
    draw, now = random.Random(seed), 0.0
    while (now := now + draw.expovariate(rate)) < seconds:
        yield now


class Target:
    """One address with its connections and the requests that wait for one."""

    def __init__(self, address: str, load: Load) -> None:
        self.address = address
        self.load = load
        self.idle: deque[Connection] = deque()
        self.waiting: deque[float] = deque()
        self.opened = 0

    def send(self, due: float) -> None:
        """Send a request now, or when a connection is there."""
        if self.idle:
            self.idle.popleft().send(due)
            return
        self.waiting.append(due)
        if self.opened < _MOST_CONNECTIONS:
            self.open()

    def open(self) -> None:
        self.opened += 1
        task = asyncio.ensure_future(self._open())
        self.load.tasks.add(task)
        task.add_done_callback(self.load.tasks.discard)

    async def _open(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            if self.address.startswith("unix:"):
                await loop.create_unix_connection(lambda: Connection(self), self.address.removeprefix("unix:"))
            else:
                host, port = self.address.rsplit(":", 1)
                await loop.create_connection(lambda: Connection(self), host, int(port))
        except OSError:
            self.opened -= 1
            if self.waiting:
                self.load.record("broken", self.waiting.popleft())


class Connection(asyncio.Protocol):
    """A kept connection that carries one request at a time."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._due: float | None = None
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._free()

    def send(self, due: float) -> None:
        self._due = due
        load = self._target.load
        load.lags.append(time.perf_counter() - due)
        self._transport.write(load.request)

    def data_received(self, data: bytes) -> None:
        self._received += data
        end = self._received.find(b"\r\n\r\n")
        if end < 0:
            return
        head = self._received[:end]
        length = _LENGTH.search(head)
        if length is None or len(self._received) < end + 4 + int(length[1]):
            return
        self._received = b""
        status = head[9:12].decode()
        if status == "503" and not _RETRY.search(head):
            status = "503 without Retry-After"
        due, self._due = self._due, None
        self._target.load.record(status, due)
        if _CLOSE.search(head):
            self._transport.close()
        else:
            self._free()

    def connection_lost(self, error: Exception | None) -> None:
        target = self._target
        target.opened -= 1
        if self in target.idle:
            target.idle.remove(self)
        if self._due is not None:
            target.load.record("broken", self._due)
        if target.waiting or target.load.closed:
            target.open()

    def _free(self) -> None:
        target = self._target
        if target.waiting:
            self.send(target.waiting.popleft())
        elif target.load.closed and time.perf_counter() < target.load.end:
            self.send(time.perf_counter())
        else:
            target.idle.append(self)


class Load:
    """A run against some addresses; `closed` where connections send as soon as they are free.

    Rates are of the `seconds` that begin `warm_up` seconds after the start: until then answers are fewer than they will
    be, since the first requests have yet to be worked on.
    """

    def __init__(
        self, addresses: Sequence[str], request: bytes, seconds: float, closed: bool, warm_up: float = 0.0
    ) -> None:
        self.closed = closed
        self.request = request
        self.targets = [Target(address, self) for address in addresses]
        self.tasks: set[asyncio.Future] = set()
        self.lags: list[float] = []
        self.times: dict[str, list[float]] = {}
        self.in_time: Counter[str] = Counter()
        self.sent = 0
        self.start = time.perf_counter()
        self.counted_from = self.start + warm_up
        self.end = self.counted_from + seconds

    def record(self, status: str, due: float) -> None:
        """Note the answer to the request that was due then."""
        now = time.perf_counter()
        self.times.setdefault(status, []).append(now - due)
        # What comes after the end was still queued: it would make the rate look better than it is.
        self.in_time[status] += self.counted_from <= now <= self.end

    async def at_rate(self, rate: float, seconds: float) -> None:
        for number, offset in enumerate(due_times(rate, seconds)):
            due = self.start + offset
            if (wait := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            self.sent += 1
            self.targets[number % len(self.targets)].send(due)
        deadline = self.end + _LAST_ANSWERS_SECONDS
        while sum(map(len, self.times.values())) < self.sent and time.perf_counter() < deadline:
            await asyncio.sleep(0.05)

    async def saturate(self, connections: int) -> None:
        for number in range(connections):
            self.targets[number % len(self.targets)].open()
        await asyncio.sleep(self.end - time.perf_counter())

    def figures(self, seconds: float) -> dict[str, float]:
        """Counts and rates; times in ms."""
        counted = {status: len(times) for status, times in self.times.items()}
        good, shed = self.times.get("200", []), self.times.get("503", [])
        answered = sum(counted.values())
        figures: dict[str, float] = {
            "sent": self.sent or answered,
            "served": len(good),
            "shed": len(shed),
            "other": max(self.sent, answered) - len(good) - len(shed),
            "served_a_second": self.in_time["200"] / seconds,
        }
        for name, times in (("served", good), ("shed", shed), ("lag", self.lags)):
            for share in (0.50, 0.99):
                value = percentile(times, share)
                figures[f"{name}_p{share * 100:.0f}_ms"] = 0.0 if value is None else value * 1000
        return figures


async def run(given: argparse.Namespace) -> dict[str, float]:
    """The figures of one run."""
    closed = given.connections is not None
    body = given.body.read_bytes()
    head = [f"POST {given.path} HTTP/1.1", "Host: bench", *given.header, f"Content-Length: {len(body)}", "", ""]
    load = Load(given.addresses, "\r\n".join(head).encode() + body, given.seconds, closed, given.warm_up)
    if closed:
        await load.saturate(given.connections)
    else:
        await load.at_rate(given.rate, given.seconds)
    return load.figures(given.seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("addresses", nargs="+", help="HOST:PORT or unix:PATH; requests go to them in turn")
    parser.add_argument("--path", required=True)
    parser.add_argument("--body", type=Path, required=True, help="file with the body")
    parser.add_argument("--header", action="append", default=[], help="'Content-Type: application/json', for example")
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--warm-up", type=float, default=0.0, help="seconds before these (%(default)s)")
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--rate", type=float, help="requests a second, sent when due")
    mode.add_argument("--connections", type=int, help="connections that send as soon as they have their answer")
    print(json.dumps(asyncio.run(run(parser.parse_args()))))


if __name__ == "__main__":
    main()
