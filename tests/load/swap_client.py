#!/usr/bin/env python3
"""Load from pooled keep-alive clients, and what they saw of a switch between two colours.

Tools that send without a pause (wrk, ab) have next to no idle connection, and an edge that closes idle connections
loses nothing of theirs. Applications think between two requests. Here every client owns one TCP connection, sends
`POST /predict`, reads the whole answer, thinks, and sends again on the same connection:

* `naive` writes without looking whether the server has closed; a reset or an end of file in place of an answer is a
  failed request, as it is for any client that may not repeat a POST;
* `checks_eof` looks first, as urllib3 does, and opens another connection where the old one was closed;
* `closes` has no pool: each request is on a connection of its own, and says so.

All times in records are seconds of the monotonic clock; names that end in `_ms` are milliseconds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import ipaddress
import json
import math
import random
import select
import socket
import sys
import time
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from operator import attrgetter
from pathlib import Path
from urllib.parse import urlsplit

KINDS = ("naive", "checks_eof", "closes")
PROBE = "probe"
COLOUR_HEADER = "x-model-colour"
VERSION_HEADER = "x-model-version"
DEFAULT_URL = "http://127.0.0.1:8080"
DEFAULT_BODY = b'{"data": [0.2, 0.6]}'
# A client whose connection is refused must not turn into a busy loop.
PAUSE_AFTER_REFUSAL_S = 0.05


class Lost(Exception):
    """The connection ended, or the answer made no sense; the message is the reason that goes into the record."""


@dataclass(slots=True)
class Record:
    """One request. `start` and `end`: monotonic seconds; `failure`: None for a good answer, else the reason."""

    client: int
    kind: str
    start: float
    end: float
    status: int | None = None
    colour: str | None = None
    version: str | None = None
    failure: str | None = None


@dataclass(slots=True)
class Switch:
    """One switch, in monotonic seconds.

    begin: before this only the earlier colour may answer; instant: the rename; done: reported complete, from here on
    a request that starts must be answered by `to`. `source` says where the instant comes from: `reported` by the
    program that switched; `link`, the change time of the renamed link, up to a kernel tick (4 ms) early; `begin`,
    where nothing better is known and the time to the first answer is an upper bound; or `unasked`, where somebody else
    switched at some time between `begin` and `done`. `reported_ms`: what the host itself measured from the switch to
    the first answer, in milliseconds.
    """

    to: str
    begin: float
    instant: float
    done: float
    source: str = "reported"
    reported_ms: float | None = None


@dataclass(frozen=True)
class Settings:
    """What to send. Durations in seconds; `think_max_s`: a client thinks between 0 and this, uniformly."""

    url: str = DEFAULT_URL
    path: str = "/predict"
    body: bytes = DEFAULT_BODY
    clients: int = 30
    kind: str = "naive"
    think_max_s: float = 0.1
    timeout_s: float = 10.0
    max_duration_s: float = 900.0
    answer_key: str | None = "output"
    seed: int | None = None


def monotonic_from_wall(wall: float) -> float:
    """Monotonic seconds of a wall-clock instant (epoch seconds), by the offset between the two clocks now."""
    return wall - (time.time() - time.monotonic())


def loopback_address(url: str) -> tuple[str, int]:
    """Host and port of a URL. Anything that isn't plain HTTP on loopback is refused: this is a load generator."""
    parts = urlsplit(url)
    host = {"localhost": "127.0.0.1"}.get(parts.hostname or "", parts.hostname or "")
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if parts.scheme != "http" or not loopback:
        raise ValueError(f"load goes to http:// on a loopback address only, not to {url!r}; use an SSH tunnel")
    return host, parts.port or 80


@dataclass(slots=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes
    keep: bool


class Connection:
    """One keep-alive TCP connection that does nothing by itself: nobody reads it while its client thinks."""

    def __init__(self, host: str, port: int) -> None:
        self._address = (host, port)
        self._socket: socket.socket | None = None
        self.opened = 0

    @property
    def is_open(self) -> bool:
        return self._socket is not None

    async def open(self) -> None:
        family = socket.AF_INET6 if ":" in self._address[0] else socket.AF_INET
        sock = socket.socket(family, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await asyncio.get_running_loop().sock_connect(sock, self._address)
        except BaseException:
            sock.close()
            raise
        self._socket = sock
        self.opened += 1

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def dropped(self) -> bool:
        """Whether the server has closed, or sent something unasked: readable while nothing is due."""
        if self._socket is None:
            return True
        poller = select.poll()
        poller.register(self._socket, select.POLLIN)
        return bool(poller.poll(0))

    async def exchange(self, request: bytes) -> Reply:
        """Send one request and read its whole answer."""
        await asyncio.get_running_loop().sock_sendall(self._socket, request)
        buffer = bytearray()
        while True:
            while (head_end := buffer.find(b"\r\n\r\n")) < 0:
                await self._read_more(buffer, "closed inside the answer" if buffer else "closed before the answer")
            status, headers, http10 = _parse_head(bytes(buffer[:head_end]))
            del buffer[: head_end + 4]
            if status >= 200:
                break
        keep = headers.get("connection", "keep-alive" if not http10 else "close").lower() != "close"
        if headers.get("transfer-encoding", "").lower() == "chunked":
            body = await self._read_chunked(buffer)
        elif "content-length" in headers:
            length = _number(headers["content-length"], 10)
            while len(buffer) < length:
                await self._read_more(buffer, "closed inside the answer")
            body = bytes(buffer[:length])
            del buffer[:length]
        else:
            keep = False
            with contextlib.suppress(Lost):
                while True:
                    await self._read_more(buffer, "end")
            body = bytes(buffer)
            buffer.clear()
        if buffer:
            raise Lost("malformed answer: more bytes than announced")
        return Reply(status, headers, body, keep)

    async def _read_more(self, buffer: bytearray, reason: str) -> None:
        data = await asyncio.get_running_loop().sock_recv(self._socket, 65536)
        if not data:
            raise Lost(reason)
        buffer += data

    async def _read_chunked(self, buffer: bytearray) -> bytes:
        body = bytearray()
        while True:
            while (line_end := buffer.find(b"\r\n")) < 0:
                await self._read_more(buffer, "closed inside the answer")
            size = _number(bytes(buffer[:line_end]).split(b";")[0].decode("latin-1"), 16)
            while len(buffer) < line_end + 2 + size + 2:
                await self._read_more(buffer, "closed inside the answer")
            body += buffer[line_end + 2 : line_end + 2 + size]
            del buffer[: line_end + 2 + size + 2]
            if size == 0:
                return bytes(body)


def _number(text: str, base: int) -> int:
    try:
        return int(text, base)
    except ValueError:
        raise Lost(f"malformed answer: length {text!r}") from None


def _parse_head(head: bytes) -> tuple[int, dict[str, str], bool]:
    first, *lines = head.decode("latin-1").split("\r\n")
    words = first.split(" ", 2)
    if len(words) < 2 or not words[0].startswith("HTTP/1.") or not words[1].isdigit():
        raise Lost(f"malformed answer: {first[:60]!r}")
    headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.strip().lower()] = value.strip()
    return int(words[1]), headers, words[0] == "HTTP/1.0"


class _Client:
    def __init__(self, number: int, kind: str, load: SwapLoad) -> None:
        self.number = number
        self.kind = kind
        self.busy = False
        self._load = load
        self._connection = Connection(*load.address)
        self._random = random.Random(None if load.settings.seed is None else load.settings.seed * 100_003 + number)

    async def run(self) -> None:
        """Think and send until the load stops; the first pause spreads the clients."""
        settings = self._load.settings
        try:
            while not self._load.stopping:
                await asyncio.sleep(self._random.uniform(0, settings.think_max_s))
                if self._load.stopping:
                    break
                self.busy = True
                record = await self.request()
                self.busy = False
                if record.failure is not None and record.failure.startswith("connect"):
                    await asyncio.sleep(PAUSE_AFTER_REFUSAL_S)
        finally:
            self._connection.close()

    async def request(self) -> Record:
        settings, connection = self._load.settings, self._connection
        if self.kind == "checks_eof" and connection.is_open and connection.dropped():
            connection.close()
        record = Record(self.number, self.kind, time.monotonic(), math.nan)
        connecting = False
        try:
            async with asyncio.timeout(settings.timeout_s):
                if not connection.is_open:
                    connecting = True
                    await connection.open()
                    connecting = False
                    # The probe closes its own connection after every watch.
                    if connection.opened > 1 and self.kind not in (PROBE, "closes"):
                        self._load.reconnects += 1
                reply = await connection.exchange(self._load.request_bytes)
        except TimeoutError:
            record.failure = "timeout"
        except Lost as lost:
            record.failure = str(lost)
        except OSError as error:
            name = errno.errorcode.get(error.errno or 0, type(error).__name__)
            # A write after the reset arrived says EPIPE, a read says ECONNRESET: the same event.
            name = "reset" if name in ("EPIPE", "ECONNRESET") else name
            record.failure = f"connect: {name}" if connecting else name
        else:
            record.status = reply.status
            record.colour = reply.headers.get(COLOUR_HEADER)
            record.version = reply.headers.get(VERSION_HEADER)
            record.failure = _judge(reply, settings.answer_key)
            if not reply.keep:
                connection.close()
        record.end = time.monotonic()
        if record.status is None:
            connection.close()
        self._load.records.append(record)
        self._load.failed += record.failure is not None
        return record

    def close(self) -> None:
        self._connection.close()


def _judge(reply: Reply, answer_key: str | None) -> str | None:
    if reply.status != 200:
        return f"status {reply.status}"
    if answer_key is not None:
        try:
            if answer_key not in json.loads(reply.body):
                return f"answer without {answer_key!r}"
        except (ValueError, TypeError):
            return "answer isn't JSON"
    return None


class SwapLoad:
    """The clients and one probe, as an asynchronous context: the load runs inside it and ends with it.

    It also ends by itself after `settings.max_duration_s` seconds, whatever the caller does.
    """

    def __init__(self, settings: Settings) -> None:
        if settings.kind not in KINDS:
            raise ValueError(f"kind is one of {', '.join(KINDS)}, not {settings.kind!r}")
        self.settings = settings
        self.address = loopback_address(settings.url)
        host = urlsplit(settings.url).netloc
        connection = "Connection: close\r\n" if settings.kind == "closes" else ""
        self.request_bytes = (
            f"POST {settings.path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n{connection}"
            f"Content-Length: {len(settings.body)}\r\n\r\n"
        ).encode("latin-1") + settings.body
        self.records: list[Record] = []
        self.failed = 0
        self.reconnects = 0
        self.stopping = False
        self.cpu_share = 0.0
        self.seconds = 0.0
        self._tasks: list[tuple[_Client, asyncio.Task[None]]] = []
        self._probing = asyncio.Event()
        self._started = (0.0, 0.0)

    async def __aenter__(self) -> SwapLoad:
        self._started = (time.monotonic(), time.process_time())
        for number in range(self.settings.clients):
            client = _Client(number, self.settings.kind, self)
            self._tasks.append((client, asyncio.create_task(client.run())))
        # The probe reconnects where its connection was closed between two watches: it measures, it isn't the load.
        probe = _Client(self.settings.clients, PROBE, self)
        self._tasks.append((probe, asyncio.create_task(self._probe(probe))))
        self._limit = asyncio.get_running_loop().call_later(self.settings.max_duration_s, self._stop)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._limit.cancel()
        self._stop()
        ended = await asyncio.gather(*(task for _, task in self._tasks), return_exceptions=True)
        self.seconds = time.monotonic() - self._started[0]
        self.cpu_share = (time.process_time() - self._started[1]) / max(self.seconds, 1e-9)
        for outcome in ended:
            # A client that died of an error of its own would otherwise look like one that lost nothing.
            if isinstance(outcome, Exception):
                raise outcome

    def _stop(self) -> None:
        self.stopping = True
        for client, task in self._tasks:
            # Requests in flight finish, for cutting them off here would look like losses; thinking ends at once.
            if not client.busy:
                task.cancel()

    @contextlib.asynccontextmanager
    async def probing(self):
        """Send probes back to back, on one connection, as long as this context lasts: about 1 ms of resolution."""
        self._probing.set()
        try:
            yield
        finally:
            self._probing.clear()

    async def first_answer_by(self, colour: str, since: float, timeout_s: float) -> bool:
        """Wait up to `timeout_s` seconds for an answer by `colour` to a probe that started after `since`."""
        limit = time.monotonic() + timeout_s
        seen = len(self.records)
        while True:
            for record in self.records[max(0, seen - 1000) :]:
                if record.kind == PROBE and record.colour == colour and record.start >= since and not record.failure:
                    return True
            seen = len(self.records)
            if time.monotonic() > limit:
                return False
            await asyncio.sleep(0.005)

    async def _probe(self, probe: _Client) -> None:
        try:
            while not self.stopping:
                if not self._probing.is_set():
                    # The edge closes an idle connection after a while, and that would count as a lost request.
                    probe.close()
                    await self._probing.wait()
                probe.busy = True
                record = await probe.request()
                probe.busy = False
                if record.failure is not None:
                    await asyncio.sleep(PAUSE_AFTER_REFUSAL_S)
        finally:
            probe.close()


def percentile(values: Iterable[float], share: float) -> float | None:
    """Nearest rank: the smallest value that at least `share` (0 to 1) of all values don't exceed; None without any."""
    ordered = sorted(values)
    if not ordered:
        return None
    return ordered[max(1, math.ceil(share * len(ordered) - 1e-9)) - 1]


def percentiles_ms(seconds: Sequence[float]) -> dict[str, float | None]:
    """p50, p95, p99 and max of durations in seconds, given in milliseconds."""
    shares = {"p50": 0.50, "p95": 0.95, "p99": 0.99, "max": 1.0}
    found = {name: percentile(seconds, share) for name, share in shares.items()}
    return {name: None if value is None else round(value * 1000, 3) for name, value in found.items()}


def wrong_colour(records: Iterable[Record], switches: Sequence[Switch], initial: str | None) -> list[Record]:
    """Good answers by a colour that wasn't allowed to answer at any time between the request's start and its end.

    While a switch is being made (`begin` to `done`) both of its colours are allowed, so a request that started before
    a switch was reported complete is never wrong with either of them.
    """
    allowed = []
    colour, since = initial, -math.inf
    for switch in switches:
        allowed.append((colour, since, switch.done))
        colour, since = switch.to, switch.begin
    allowed.append((colour, since, math.inf))
    untils = [until for *_, until in allowed]

    def was_allowed(record: Record) -> bool:
        for colour, since, _ in allowed[bisect_right(untils, record.start) :]:
            if since > record.end:
                return False
            if colour == record.colour:
                return True
        return False

    return [record for record in records if record.failure is None and not was_allowed(record)]


def describe_switches(records: Sequence[Record], switches: Sequence[Switch], initial: str | None) -> list[dict]:
    """For each switch what the clients saw of it; times in milliseconds after the switch's instant.

    `first_new_ms`: end of the first answer by the new colour; `last_old_start_ms`: start of the last request that the
    old colour answered; `old_after_instant`, `wrong_after_done`: requests started after the instant of the rename, or
    after the switch was reported complete, and answered by the old colour.
    """
    described = []
    good = sorted((record for record in records if record.failure is None), key=attrgetter("start"))
    starts = [record.start for record in good]
    for index, switch in enumerate(switches):
        old = switches[index - 1].to if index else initial
        earlier = switches[index - 1].done if index else -math.inf
        until = switches[index + 1].begin if index + 1 < len(switches) else math.inf
        near = good[bisect_left(starts, earlier) : bisect_right(starts, until)]
        new_ends = [r.end for r in near if r.colour == switch.to and switch.begin <= r.end <= until]
        old_starts = [r.start for r in near if r.colour == old and r.end < until]
        described.append(
            {
                "to": switch.to,
                "source": switch.source,
                "first_new_ms": _after_ms(min(new_ends, default=None), switch.instant),
                "last_old_start_ms": _after_ms(max(old_starts, default=None), switch.instant),
                "old_after_instant": sum(start > switch.instant for start in old_starts)
                if switch.source == "reported"
                else None,
                "wrong_after_done": sum(start >= switch.done for start in old_starts),
                "reported_ms": switch.reported_ms,
                "command_ms": round((switch.done - switch.begin) * 1000, 3),
            }
        )
    return described


def _after_ms(value: float | None, instant: float) -> float | None:
    return None if value is None else round((value - instant) * 1000, 3)


@dataclass
class Summary:
    """Figures of one run; latencies and switch times in milliseconds, `seconds` and `cpu_share` of the client."""

    kind: str
    clients: int
    think_max_ms: float
    seconds: float
    cpu_share: float
    requests: int
    probes: int
    failed: int
    failures: dict[str, int]
    reconnects: int
    wrong_colour: int
    colours: dict[str, int]
    versions: dict[str, int]
    latency_ms: dict[str, float | None]
    switch_count: int = 0
    first_new_ms: dict[str, float | None] = field(default_factory=dict)
    switches: list[dict] = field(default_factory=list)

    def lost(self) -> int:
        """Failed requests whose connection ended in place of an answer, which is what a reload does to a client."""
        return sum(n for reason, n in self.failures.items() if reason == "reset" or reason.startswith("closed"))

    def as_dict(self) -> dict:
        return asdict(self)


def summarise(load: SwapLoad, switches: Sequence[Switch] = (), initial: str | None = None) -> Summary:
    """Figures of a finished load. A failed or wrong probe counts like a failed or wrong request."""
    records, settings = load.records, load.settings
    if initial is None:
        initial = next((r.colour for r in records if r.failure is None), None)
    failed = [r for r in records if r.failure is not None]
    clients = [r for r in records if r.kind != PROBE]
    described = describe_switches(records, switches, initial)
    return Summary(
        kind=settings.kind,
        clients=settings.clients,
        think_max_ms=settings.think_max_s * 1000,
        seconds=round(load.seconds, 3),
        cpu_share=round(load.cpu_share, 3),
        requests=len(clients),
        probes=len(records) - len(clients),
        failed=len(failed),
        failures=dict(Counter(str(r.failure) for r in failed).most_common()),
        reconnects=load.reconnects,
        wrong_colour=len(wrong_colour(records, switches, initial)) if switches else 0,
        colours=dict(Counter(str(r.colour) for r in records if r.failure is None)),
        versions=dict(Counter(str(r.version) for r in records if r.failure is None)),
        # Probes never pause and would pull the percentiles towards the state of a busy moment.
        latency_ms=percentiles_ms([r.end - r.start for r in clients if r.failure is None]),
        switch_count=len(switches),
        first_new_ms=percentiles_ms([s["first_new_ms"] / 1000 for s in described if s["first_new_ms"] is not None]),
        switches=described,
    )


def read_switches(path: Path) -> list[Switch]:
    """Switches from a JSON list of `{"to": "green", "at": EPOCH, "done": EPOCH}`; without `done` it is `at`."""
    switches = []
    for entry in json.loads(path.read_text()):
        at = monotonic_from_wall(float(entry["at"]))
        switches.append(Switch(entry["to"], at, at, monotonic_from_wall(float(entry.get("done", entry["at"])))))
    return switches


def print_summary(summary: Summary) -> None:
    latency = summary.latency_ms
    print(f"{summary.clients} {summary.kind} clients, think 0-{summary.think_max_ms:g} ms, {summary.seconds:.1f} s")
    print(f"requests {summary.requests}, probes {summary.probes}, reconnects {summary.reconnects}")
    print(f"failed {summary.failed} {summary.failures or ''}".rstrip())
    print(f"latency ms: p50 {latency['p50']}, p95 {latency['p95']}, p99 {latency['p99']}; colours {summary.colours}")
    if summary.switches:
        first = summary.first_new_ms
        print(f"switches {summary.switch_count}: first new answer p50 {first['p50']} ms, max {first['max']} ms")
        print(f"answered by the wrong colour: {summary.wrong_colour}")


async def run_for(settings: Settings, seconds: float, probe: bool) -> SwapLoad:
    """Load for `seconds` seconds, with or without the probe; the finished load."""
    async with SwapLoad(settings) as load:
        if probe:
            async with load.probing():
                await asyncio.sleep(seconds)
        else:
            await asyncio.sleep(seconds)
    return load


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Load from keep-alive clients that think between two requests. Loopback only; ends by itself.",
        epilog="Exit status: 0 no request failed and none was answered by the wrong colour, 1 otherwise.",
    )
    parser.add_argument("--url", default=DEFAULT_URL, help="the edge (default: %(default)s)")
    parser.add_argument("--path", default="/predict", help="default: %(default)s")
    parser.add_argument("--body", default=DEFAULT_BODY.decode(), help="JSON to send (default: %(default)s)")
    parser.add_argument("--clients", type=int, default=30, help="clients, one connection each (default: %(default)s)")
    parser.add_argument("--kind", choices=KINDS, default="naive", help="default: %(default)s")
    parser.add_argument("--think-max-ms", type=float, default=100, help="longest pause in ms (default: %(default)s)")
    parser.add_argument("--slow", action="store_true", help="think up to 1500 ms, as people do")
    parser.add_argument("--timeout", type=float, default=10, help="seconds for one request (default: %(default)s)")
    parser.add_argument("--duration", type=float, default=10, help="seconds of load (default: %(default)s)")
    parser.add_argument("--probe", action="store_true", help="probe back to back all the time (uses about one core)")
    parser.add_argument(
        "--switches",
        type=Path,
        help='file read when the load ends: JSON list of {"to": COLOUR, "at": EPOCH SECONDS, "done": EPOCH SECONDS}',
    )
    parser.add_argument("--initial-colour", help="live colour at the start (default: that of the first answer)")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    given = parser.parse_args(arguments)
    settings = Settings(
        url=given.url,
        path=given.path,
        body=given.body.encode(),
        clients=given.clients,
        kind=given.kind,
        think_max_s=1.5 if given.slow else given.think_max_ms / 1000,
        timeout_s=given.timeout,
        max_duration_s=given.duration + given.timeout,
    )
    try:
        loopback_address(settings.url)
    except ValueError as error:
        parser.error(str(error))
    load = asyncio.run(run_for(settings, given.duration, given.probe))
    summary = summarise(load, read_switches(given.switches) if given.switches else (), given.initial_colour)
    print_summary(summary)
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(summary.as_dict(), indent=2) + "\n")
    return 1 if summary.failed or summary.wrong_colour else 0


if __name__ == "__main__":
    sys.exit(main())
