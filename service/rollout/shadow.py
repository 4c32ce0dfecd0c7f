"""The daemon that takes copies of live requests and has them compared: `python3 -m rollout.shadow`.

nginx copies a share of the live requests to a socket, and gets a 204 as soon as a copy has arrived. Two further
processes send each copy to both colours. Where these are slow, copies wait, and where too many wait, further ones are
dropped: nobody who waits for a prediction waits for this.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import itertools
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

from rollout import config, report
from rollout.compare import prediction
from rollout.errors import ApplianceError, Failed
from rollout.replay import AGREE, DIFFER, ERROR_IDLE, ERROR_LIVE, SHED, Copy, Outcome

DROPPED = "dropped"
# Copies that are received, wait or are compared, and their bodies together.
MOST_COPIES = 256
MOST_BYTES = 64 * 1024 * 1024
MOST_BODY_BYTES = 8 * 1024 * 1024
_AT_A_TIME = 2
_RESULTS = (AGREE, DIFFER, ERROR_LIVE, ERROR_IDLE, SHED, DROPPED)
_DISTANCES = (0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1, 10, 100)
_SECONDS_BETWEEN_LINES = 60.0
_BACKLOG = 512
_SKIPPED_BYTES = 65536
_NO_CONTENT = b"HTTP/1.1 204 No Content\r\n\r\n"


class Tally:
    """What came of the copies since the process began. For one thread."""

    def __init__(self) -> None:
        self._started = time.time()
        self._results = dict.fromkeys(_RESULTS, 0)
        self._distances = [0] * (len(_DISTANCES) + 1)
        self._sum = 0.0

    def add(self, outcome: Outcome) -> None:
        """Count a copy."""
        self._results[outcome.result] += 1
        if outcome.distance is not None:
            self._distances[bisect.bisect_left(_DISTANCES, outcome.distance)] += 1
            # One infinite distance would spoil the sum for good.
            self._sum += outcome.distance if math.isfinite(outcome.distance) else 0.0

    def summary(self) -> dict[str, Any]:
        """The counts by result; `started` is when all were 0, in seconds since the epoch."""
        return {**self._results, "started": round(self._started, 3)}

    def text(self) -> str:
        """In Prometheus's text format."""
        name = "appliance_shadow_requests_total"
        lines = [f"# HELP {name} Copies of live requests, by what came of them.", f"# TYPE {name} counter"]
        lines += [f'{name}{{result="{result}"}} {count}' for result, count in self._results.items()]
        name = "appliance_shadow_distance"
        lines += [
            f"# HELP {name} Largest difference of two numbers in the answers of both colours to a copy.",
            f"# TYPE {name} histogram",
        ]
        counts = list(itertools.accumulate(self._distances))
        limits = [*(f"{limit:g}" for limit in _DISTANCES), "+Inf"]
        lines += [f'{name}_bucket{{le="{limit}"}} {count}' for limit, count in zip(limits, counts, strict=True)]
        lines += [f"{name}_sum {self._sum}", f"{name}_count {counts[-1]}"]
        return "\n".join(lines) + "\n"


class Receiver:
    """Speaks HTTP/1.1 with nginx, and hands on what is to be compared."""

    def __init__(self, configuration: Path) -> None:
        self._configuration = configuration
        self._waiting: asyncio.Queue[Copy] = asyncio.Queue()
        self._turns = itertools.count()
        self._tally = Tally()
        self._copies = 0
        self._bytes = 0
        self._last_line: dict[str, float] = {}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Answer what comes on one connection."""
        try:
            while await self._answer(reader, writer):
                pass
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError, ValueError):
            # The other side went away, or doesn't speak as nginx does: either way there is nobody to answer.
            pass
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; whether the connection is kept. Raises ValueError where it isn't HTTP."""
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
        method, target, _ = first.split(" ")
        headers = _headers(lines)
        length, path = _length(headers), headers.get("x-shadow-path", "")
        if prediction(method, path) is None:
            await _skip(reader, length)
            writer.write(self._own(method, target))
        elif self._take(length):
            try:
                body = await reader.readexactly(length)
            except BaseException:
                self._give_back(length)
                raise
            writer.write(_NO_CONTENT)
            self._waiting.put_nowait(Copy(next(self._turns), method, path, headers, body))
        else:
            self._tally.add(Outcome(DROPPED))
            await _skip(reader, length)
            writer.write(_NO_CONTENT)
        await writer.drain()
        return headers.get("connection", "").lower() != "close"

    def _own(self, method: str, target: str) -> bytes:
        """The answer to what isn't a copy of a prediction."""
        if (method, target) == ("GET", "/metrics"):
            return _ok("text/plain; version=0.0.4; charset=utf-8", self._tally.text())
        if (method, target) == ("GET", "/summary"):
            return _ok("application/json", json.dumps(self._tally.summary()))
        return _NO_CONTENT

    def _take(self, size: int) -> bool:
        """Whether there is room for a copy with a body of `size` bytes, which is then taken."""
        if self._copies >= MOST_COPIES or self._bytes + size > MOST_BYTES or size > MOST_BODY_BYTES:
            return False
        self._copies += 1
        self._bytes += size
        return True

    def _give_back(self, size: int) -> None:
        self._copies -= 1
        self._bytes -= size

    async def compare(self) -> None:
        """Have copies compared, one after the other. Raises Failed where the process that does it has died."""
        copy = await self._waiting.get()
        # Only now: most of the time nothing is shadowed.
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "rollout.replay", str(self._configuration)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        while True:
            try:
                process.stdin.write(copy.dump())
                await process.stdin.drain()
                line = await process.stdout.readline()
            except ConnectionError:
                line = b""
            if not line:
                raise Failed("a process that compares has died: everything starts afresh")
            self._finish(len(copy.body), Outcome(**json.loads(line)))
            copy = await self._waiting.get()

    def _finish(self, size: int, outcome: Outcome) -> None:
        self._give_back(size)
        self._tally.add(outcome)
        now = time.monotonic()
        last = self._last_line.get(outcome.result, -math.inf)
        if outcome.trouble is not None and now - last >= _SECONDS_BETWEEN_LINES:
            self._last_line[outcome.result] = now
            report.progress(f"shadow: {outcome.trouble}")


def _headers(lines: list[str]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        name, value = name.lower(), value.strip()
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return headers


def _length(headers: dict[str, str]) -> int:
    if "transfer-encoding" in headers:
        raise ValueError("nginx sends the length of every body")
    return int(headers.get("content-length", "0"))


async def _skip(reader: asyncio.StreamReader, length: int) -> None:
    """Read a body and forget it."""
    while length > 0:
        skipped = await reader.read(min(length, _SKIPPED_BYTES))
        if not skipped:
            raise ConnectionError("the body isn't whole")
        length -= len(skipped)


def _ok(content_type: str, text: str) -> bytes:
    body = text.encode()
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def run(configuration: Path) -> None:
    """Serve on the socket for as long as the process lives. Raises ApplianceError."""
    settings = config.load(configuration)
    path, receiver = settings.shadow_socket, Receiver(configuration)
    try:
        server = await asyncio.start_unix_server(receiver.serve, path, backlog=_BACKLOG)
        # nginx gets at it by the group that the directory gives to what is made in it.
        os.chmod(path, 0o660)
    except OSError as error:
        raise Failed(
            f"the socket {path} can't be made: {error.strerror or error}; "
            f"'systemd-tmpfiles --create' makes its directory as it should be"
        ) from error
    report.progress(f"shadow: takes copies at {path}, with a tolerance of {settings.shadow_tolerance:g}")
    await asyncio.gather(server.serve_forever(), *(receiver.compare() for _ in range(_AT_A_TIME)))


def main() -> int:
    """Run the daemon; the exit status."""
    parser = argparse.ArgumentParser(prog="python3 -m rollout.shadow", description="Compare the colours' answers.")
    parser.add_argument("--config", type=Path, default=config.DEFAULT_PATH, metavar="FILE")
    try:
        asyncio.run(run(parser.parse_args().config))
    except ApplianceError as fault:
        report.progress(fault.message)
        return fault.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
