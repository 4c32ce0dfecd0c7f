"""Load: wrk and ab for closed loops over TCP; `open_loop.py` for a fixed rate and for sockets of other kinds."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.report import ROOT, BenchError, run

_SCRIPT = ROOT / "benchmarks" / "post.lua"
_OPEN_LOOP = ROOT / "benchmarks" / "open_loop.py"
# What a generator gets beyond the time that it was asked to send for.
_MARGIN_SECONDS = 60.0
# Before a closed loop is counted.
WARM_UP_S = 1.0
_AB_SECONDS = 300.0
_PACKAGES = {"wrk": "wrk", "ab": "apache2-utils"}


@dataclass(frozen=True)
class Body:
    """What is posted. `header_length` is the JSON part's of a body with binary tensors."""

    data: bytes
    content_type: str = "application/json"
    header_length: int | None = None

    @property
    def headers(self) -> dict[str, str]:
        """What describes it."""
        found = {"Content-Type": self.content_type}
        if self.header_length is not None:
            found["Inference-Header-Content-Length"] = str(self.header_length)
        return found


@dataclass(frozen=True)
class Closed:
    """What wrk measured: `answered` counts answers below 400, `refused` the others, `broken` connections' errors."""

    seconds: float
    answered: int
    refused: int
    broken: int

    @property
    def rate(self) -> float:
        """Good answers a second."""
        return self.answered / self.seconds


@dataclass(frozen=True)
class Ab:
    """What ab measured: requests without a good answer, and latencies."""

    requests: int
    failed: int
    p50_ms: float
    p99_ms: float


def wrk(url: str, body: Body, connections: int, seconds: float) -> Closed:
    """Post `body` on `connections` kept connections, each sending when its answer is there."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(body.data)
        file.flush()
        settings = {"BODY_FILE": file.name, "CONTENT_TYPE": body.content_type}
        # wrk takes whole seconds.
        duration = max(1, round(seconds))
        command = ["wrk", "-t1", f"-c{connections}", f"-d{duration}s", "--timeout", "10s", "-s", str(_SCRIPT)]
        return parse_wrk(run([*command, url], duration + _MARGIN_SECONDS, environment={**os.environ, **settings}))


def parse_wrk(output: str) -> Closed:
    """The line that `post.lua` prints."""
    line = next((line for line in reversed(output.splitlines()) if line.startswith("{")), None)
    if line is None:
        raise BenchError(f"wrk printed no summary: {output[-500:]!r}")
    found = json.loads(line)
    if found["requests"] == 0 or found["seconds"] <= 0:
        raise BenchError(f"no request was answered: {line}")
    answered = found["requests"] - found["refused"]
    return Closed(found["seconds"], answered, found["refused"], found["broken"])


def ab(url: str, body: Body, requests: int, connections: int, *options: str) -> Ab:
    """Post `body` `requests` times, each on a connection of its own, `connections` at a time; `options` are ab's."""
    with tempfile.TemporaryDirectory() as folder:
        file, percentiles = Path(folder) / "body", Path(folder) / "percentiles.csv"
        file.write_bytes(body.data)
        # -l: rows of one batch may differ from a lone row in the last digit, and so in length.
        command = ["ab", "-q", "-l", "-s", "30", *options, "-n", str(requests), "-c", str(connections)]
        command += ["-p", str(file), "-T", body.content_type, "-e", str(percentiles), url]
        output = run(command, _AB_SECONDS)
        return parse_ab(output, percentiles.read_text())


def parse_ab(output: str, percentiles: str) -> Ab:
    """ab's summary, and the file that its `-e` writes: times in ms by percentage, finer than the summary's."""
    counts = {name: int(value) for name, value in re.findall(r"^([A-Z][\w -]+):\s+(\d+)", output, re.MULTILINE)}
    times = dict(line.split(",") for line in percentiles.splitlines()[1:])
    try:
        failed = counts["Failed requests"] + counts.get("Non-2xx responses", 0)
        return Ab(counts["Complete requests"], failed, float(times["50"]), float(times["99"]))
    except KeyError as error:
        raise BenchError(f"ab's output lacks {error}: {output[-500:]!r}") from error


def paced(addresses: Sequence[str], path: str, body: Body, *, rate: float, seconds: float) -> dict[str, float]:
    """Post at a fixed mean rate, whether answers come or not; the figures that `open_loop.py` prints."""
    return _open_loop(addresses, path, body, seconds, ["--rate", str(rate)])


def saturated(addresses: Sequence[str], path: str, body: Body, *, connections: int, seconds: float) -> dict[str, float]:
    """The same client as `paced`, but each connection sends as soon as its answer is there."""
    mode = ["--connections", str(connections), "--warm-up", str(WARM_UP_S)]
    return _open_loop(addresses, path, body, seconds, mode)


def _open_loop(
    addresses: Sequence[str], path: str, body: Body, seconds: float, mode: Sequence[str]
) -> dict[str, float]:
    with tempfile.NamedTemporaryFile() as file:
        file.write(body.data)
        file.flush()
        command = [sys.executable, str(_OPEN_LOOP), "--path", path, "--body", file.name, "--seconds", str(seconds)]
        command += [f"--header={name}: {value}" for name, value in body.headers.items()]
        output = run([*command, *mode, *addresses], seconds + _MARGIN_SECONDS)
    return json.loads(output.splitlines()[-1])


def require(tool: str) -> None:
    """Raise BenchError where wrk or ab is missing."""
    if shutil.which(tool) is None:
        raise BenchError(f"{tool} isn't installed: apt-get install {_PACKAGES[tool]}")
