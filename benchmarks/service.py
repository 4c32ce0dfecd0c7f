#!/usr/bin/env python3
"""Measure the model service beside its peers: a table, `reports/service_bench.json`, a part of `docs/benchmarks.md`.

Needs no appliance, but wrk and ab, and an idle machine: generator and servers share its cores. Everything is on
127.0.0.1. Peers are installed on the first run, each into a virtual environment of its own; TorchServe also needs Java.
"""

from __future__ import annotations

import argparse
import compileall
import contextlib
import importlib.metadata
import io
import json
import os
import re
import shlex
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "load")]

from swap_client import percentile  # noqa: E402

from benchmarks import report  # noqa: E402
from benchmarks.generators import WARM_UP_S, Body, Closed, ab, paced, require, saturated, wrk  # noqa: E402
from benchmarks.processes import Process, cpu_between  # noqa: E402
from benchmarks.report import BenchError, Row, machine  # noqa: E402
from benchmarks.servers import (  # noqa: E402
    PEER_NAMES,
    PEERS,
    WORKERS,
    Server,
    check_answer,
    ours,
    peer,
    post,
    simplemodel_example,
)

MARKS = ("<!-- service-bench:begin, written by `make bench` -->", "<!-- service-bench:end -->")
CONNECTIONS = (64, 200)
# Requests a second, ours / theirs; the other peers are measured without a bar.
RATE_BARS = {"fastapi": 1.3, "flask": 2.5, "torchserve": 3.0}
CPU_BARS = {"fastapi": 0.8}
PACKAGES = {
    "fastapi": ("fastapi", "uvicorn"),
    "flask": ("Flask", "gunicorn"),
    "torchserve": ("torchserve",),
    "mosec": ("mosec",),
    "litserve": ("litserve",),
    "bentoml": ("bentoml",),
}
AB_REQUESTS, AB_CONNECTIONS = 10_000, 200
TAIL_BAR = 3.0
# As slow as ResNet18 on one core, so that the generator, which shares the cores, takes little of them.
SLOW_S = 0.05
OVERLOAD_CONNECTIONS, OVERLOAD_RUNS = 64, 5
SERVED_BAR, SHED_BAR_MS, HEALTH_BAR_MS, GROWTH_BAR = 0.9, 50.0, 100.0, 5.0
HEALTH_PERIOD_S, MEMORY_PERIOD_S = 0.1, 3.0
MEMORY_BAR, WEIGHTS_MIB, WEIGHTS_WORKERS, WEIGHTS_BAR = 0.6, 200, 4, 1.5
IMAGE_CLIENTS, IMAGE_BATCHES, IMAGE_BAR = 16, (1, 2, 4, 8, 16), 0.95
# Answers come in batches: with 4 images at a time of 35 a second, short rounds would be coarse.
IMAGE_SECONDS = 10.0
# So are rows that take long.
CLOSED_SECONDS = 10.0
START_RUNS, START_BAR_S = 5, 5.0
# In which a peer's queue must have become shorter once nobody asks any more.
QUEUE_S = 10.0


@dataclass
class Rounds:
    """What a server did in each round of a closed loop."""

    runs: list[Closed] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """Median of good answers a second."""
        return statistics.median(run.rate for run in self.runs)

    @property
    def cpu_us(self) -> float:
        """Median of the server's CPU time for each good answer, in µs."""
        pairs = zip(self.cpu_seconds, self.runs, strict=True)
        return statistics.median(1e6 * seconds / max(run.answered, 1) for seconds, run in pairs)

    @property
    def lost(self) -> int:
        """Requests refused or broken, of all rounds."""
        return sum(run.refused + run.broken for run in self.runs)

    def add(self, server: Server, body: Body, connections: int, seconds: float) -> None:
        """Measure one more round."""
        before = server.process.samples()
        self.runs.append(wrk(server.url(), body, connections, seconds))
        self.cpu_seconds.append(cpu_between(before, server.process.samples()))


def measure_throughput(given: argparse.Namespace) -> list[Row]:
    """Requests a second and CPU for each, ours and a peer's in turn, so that a noisy minute hits both."""
    require("wrk")
    rows = []
    for name in given.peers:
        print(f"  {name} …", flush=True)
        with _unmeasured(rows, f"throughput {name}", f"requests a second, ours / {name}", "x", RATE_BARS.get(name)):
            rows += _throughput_beside(name, given)
    return rows


def _throughput_beside(name: str, given: argparse.Namespace) -> list[Row]:
    body, _ = simplemodel_example()
    found = {}
    with ours() as mine, peer(name, given.environments) as other:
        check_answer(mine)
        check_answer(other)
        sides = ((mine, other), (other, mine))
        for connections in CONNECTIONS:
            rounds = {server.name: Rounds() for server in (mine, other)}
            for server, idle in sides:
                with idle.process.paused():
                    wrk(server.url(), body, connections, WARM_UP_S)
            for _ in range(given.rounds):
                for server, idle in sides:
                    with idle.process.paused():
                        rounds[server.name].add(server, body, connections, given.seconds)
            found[connections] = (rounds[mine.name], rounds[other.name])
        # Under load, too, nobody may have been left with a wrong answer.
        check_answer(mine)
        check_answer(other, QUEUE_S)
    return throughput_rows(name, found, f"{given.rounds} x {given.seconds:g} s")


def throughput_rows(name: str, found: Mapping[int, tuple[Rounds, Rounds]], runs: str) -> list[Row]:
    """Rows of our rounds and a peer's, by number of connections."""
    loads = "|".join(str(connections) for connections in found)
    command = f"wrk -t1 -c{loads} -s benchmarks/post.lua …/predict; {', '.join(versions(name))}"
    rows = []
    for connections, (mine, other) in found.items():
        figure = f"requests a second, ours / {name}, {connections} connections"
        note = f"{mine.rate:,.0f} / {other.rate:,.0f} a second"
        note += "".join(f"; {who} lost {rounds.lost}" for who, rounds in (("ours", mine), (name, other)) if rounds.lost)
        ratio = mine.rate / other.rate if other.rate else None
        rows.append(
            Row(f"throughput {name}", figure, ratio, "x", RATE_BARS.get(name), note, command, runs, at_least=True)
        )
    for connections, (mine, other) in found.items():
        figure = f"server CPU a request, ours / {name}, {connections} connections"
        note = f"{mine.cpu_us:.0f} / {other.cpu_us:.0f} µs"
        ratio = mine.cpu_us / other.cpu_us if other.rate else None
        rows.append(Row(f"throughput {name}", figure, ratio, "x", CPU_BARS.get(name), note, command, runs))
    return rows


def measure_tail(given: argparse.Namespace) -> list[Row]:
    """Failed requests and the spread of latency where each request comes on a new connection."""
    require("ab")
    rows = []
    with ours() as server:
        rows += _tail_of(server, given.rounds, "ours", 0, TAIL_BAR)
    for name in given.peers:
        print(f"  {name} …", flush=True)
        with (
            _unmeasured(rows, f"tail {name}", f"new connections, {name}: p99 / p50", "x", None),
            peer(name, given.environments) as server,
        ):
            rows += _tail_of(server, 1, name, None, None)
    return rows


def _tail_of(server: Server, runs: int, name: str, failed_bar: float | None, tail_bar: float | None) -> list[Row]:
    body, _ = simplemodel_example()
    check_answer(server)
    found = [ab(server.url(), body, AB_REQUESTS, AB_CONNECTIONS) for _ in range(runs)]
    command = f"ab -l -n {AB_REQUESTS} -c {AB_CONNECTIONS} -p … http://127.0.0.1:…{server.path}"
    failed = sum(run.failed + AB_REQUESTS - run.requests for run in found)
    middle = sorted(found, key=lambda run: run.p99_ms / max(run.p50_ms, 1e-3))[len(found) // 2]
    ratio = middle.p99_ms / max(middle.p50_ms, 1e-3)
    note = f"p50 {middle.p50_ms:.1f}, p99 {middle.p99_ms:.1f} ms"
    rows = [
        (f"new connections, {name}: failed", failed, "requests", failed_bar, f"of {runs * AB_REQUESTS}"),
        (f"new connections, {name}: p99 / p50", ratio, "x", tail_bar, note),
    ]
    return [Row(f"tail {name}", *row, command, str(runs)) for row in rows]


@dataclass
class Overload:
    """A run at `rate`, twice what a closed loop served just before; `most` is the mean of that and of one after it."""

    most: float
    rate: float
    load: Mapping[str, float]
    health_seconds: Sequence[float]
    health_failures: int
    memory_mib: Sequence[float]


def measure_overload(given: argparse.Namespace) -> list[Row]:
    """Twice what the service can do, at a fixed rate: what it serves, how it refuses, and whether it stays well."""
    from benchmarks.bundles import make_slow

    with tempfile.TemporaryDirectory(prefix="bench-", dir="/var/tmp") as folder:
        bundle = make_slow(Path(folder), SLOW_S)
        body = _first_request(bundle)
        with ours(bundle) as server:
            addresses = server.worker_addresses()

            def maximum() -> float:
                loop = {"connections": OVERLOAD_CONNECTIONS, "seconds": max(given.seconds, CLOSED_SECONDS)}
                return saturated(addresses, "/predict", body, **loop)["served_a_second"]

            runs = []
            before = maximum()
            # Runs between closed loops, because a machine that others use is not as fast at every moment.
            for _ in range(OVERLOAD_RUNS):
                if before == 0:
                    raise BenchError("the service served nothing in a closed loop")
                with Watch(server.sockets / "control.sock", server.process) as watch:
                    load = paced(addresses, "/predict", body, rate=2 * before, seconds=given.overload_seconds)
                after = maximum()
                most = (before + after) / 2
                runs.append(Overload(most, 2 * before, load, watch.health_seconds, watch.failures, watch.memory_mib))
                before = after
    return overload_rows(runs, given.overload_seconds)


def overload_rows(runs: Sequence[Overload], seconds: float) -> list[Row]:
    """Rows of some runs: the median of what was served, the worst of everything else."""
    command = f"open_loop.py --rate {runs[0].rate:.0f} --seconds {seconds:g}, Poisson, to both workers' sockets"
    shares = [run.load["served_a_second"] / run.most for run in runs]
    p50 = statistics.median(run.load["served_p50_ms"] for run in runs)
    served_note = (
        f"{', '.join(f'{share:.3f}' for share in shares)}; the last: {runs[-1].load['served_a_second']:.0f} of "
    )
    served_note += f"{runs[-1].most:.0f} a second; served p50 {p50:.0f} ms"

    def worst(figure: str) -> float:
        return max(run.load[figure] for run in runs)

    shed_note = f"p50 {worst('shed_p50_ms'):.1f} ms, from when a request was due; sent late by "
    shed_note += f"{worst('lag_p99_ms'):.1f} ms (p99)"
    seen = [second for run in runs for second in run.health_seconds]
    health = [1000 * (percentile(seen, share) or 0.0) for share in (0.5, 0.99, 1.0)]
    health_note = f"p50 {health[0]:.1f} ms of {len(seen)}, every {HEALTH_PERIOD_S:g} s"
    failures = sum(run.health_failures for run in runs)
    growth, first, last = max(grown(run.memory_mib) for run in runs)
    served = statistics.median(shares)
    number = str(len(runs))
    rows = [
        Row("overload", "twice the maximum: served / maximum", served, "x", SERVED_BAR, served_note, command, number)
    ]
    rows[0].at_least = True
    others = sum(run.load["other"] for run in runs)
    shed = f"{sum(run.load['shed'] for run in runs)} shed"
    for figure, value, unit, bar, note in (
        ("twice the maximum: neither 200 nor 503 with Retry-After", others, "requests", 0, shed),
        ("twice the maximum: a 503 takes, p99", worst("shed_p99_ms"), "ms", SHED_BAR_MS, shed_note),
        ("twice the maximum: GET /health, p99", health[1], "ms", HEALTH_BAR_MS, health_note),
        ("twice the maximum: GET /health, worst", health[2], "ms", HEALTH_BAR_MS, health_note),
        ("twice the maximum: GET /health not answered with 200", failures, "requests", 0, health_note),
        ("twice the maximum: memory growth", growth, "%", GROWTH_BAR, f"PSS, {first:.0f} to {last:.0f} MiB"),
    ):
        rows.append(Row("overload", figure, value, unit, bar, note, command, number))
    return rows


def grown(mib: Sequence[float]) -> tuple[float, float, float]:
    """Growth in %, from the median of the second tenth of the samples, after warm-up, to that of the last tenth."""
    tenth = max(1, len(mib) // 10)
    first = statistics.median(mib[tenth : 2 * tenth] or mib[:1])
    last = statistics.median(mib[-tenth:])
    return 100 * (last / first - 1), first, last


class Watch:
    """Looks at a service's health and memory from threads of its own, while a load runs."""

    def __init__(self, control: Path, process: Process) -> None:
        self.health_seconds: list[float] = []
        self.failures = 0
        self.memory_mib: list[float] = []
        self._control, self._process = control, process
        self._over = threading.Event()
        looks = ((self._look_at_health, HEALTH_PERIOD_S), (self._look_at_memory, MEMORY_PERIOD_S))
        self._threads = [threading.Thread(target=self._repeat, args=look, daemon=True) for look in looks]

    def __enter__(self) -> Watch:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _repeat(self, look: Callable[[], None], period: float) -> None:
        due = time.monotonic()
        while not self._over.is_set():
            look()
            due = max(due + period, time.monotonic())
            self._over.wait(due - time.monotonic())

    def _look_at_health(self) -> None:
        started, status = time.perf_counter(), b""
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(10)
            connection.connect(str(self._control))
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n")
            status = connection.makefile("rb").readline()
        self.health_seconds.append(time.perf_counter() - started)
        self.failures += b" 200 " not in status

    def _look_at_memory(self) -> None:
        self.memory_mib.append(self._process.pss())


def measure_memory(given: argparse.Namespace) -> list[Row]:
    """PSS, so that pages that processes share count once: beside FastAPI, and with many weights."""
    from benchmarks.bundles import make_large

    with ours() as server:
        mine = _memory_after_load(server)
    rows: list[Row] = []
    command = "smaps_rollup, Pss, after a second of 64 connections"
    figure = f"memory of {WORKERS} workers, ours / fastapi"
    with _unmeasured(rows, "memory", figure, "x", MEMORY_BAR), peer("fastapi", given.environments) as server:
        other = _memory_after_load(server)
        note = f"{mine:.0f} / {other:.0f} MiB"
        rows.append(Row("memory", figure, mine / other, "x", MEMORY_BAR, note, command, "1"))
    with ours(workers=1) as server:
        single = _memory_after_load(server)
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/var/tmp") as folder:
        bundle = make_large(Path(folder), WEIGHTS_MIB)
        with ours(bundle, workers=WEIGHTS_WORKERS) as server:
            shared = _memory_after_load(server, _first_request(bundle))
    figure = f"memory of {WEIGHTS_WORKERS} workers, {WEIGHTS_MIB} MiB of weights, / (weights + one worker's service)"
    note = f"{shared:.0f} / ({WEIGHTS_MIB} + {single:.0f}) MiB"
    rows.append(Row("memory", figure, shared / (WEIGHTS_MIB + single), "x", WEIGHTS_BAR, note, command, "1"))
    return rows


def _memory_after_load(server: Server, body: Body | None = None) -> float:
    address = f"127.0.0.1:{server.port}"
    load = saturated([address], server.path, body or simplemodel_example()[0], connections=64, seconds=1)
    if not load["served"] or load["other"]:
        raise BenchError(f"{server.name} answered {load['served']:.0f} rightly and {load['other']:.0f} otherwise")
    return server.process.pss()


def measure_images(given: argparse.Namespace) -> list[Row]:
    """ResNet18's images a second, beside a loop of PyTorch's in as many processes, at its best batch size."""
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/var/tmp") as scratch:
        folder = Path(scratch)
        bundle = _resnet18(folder)
        photo, pixels = folder / "photo.jpg", folder / "pixels"
        photo.write_bytes(_photo())
        pixels.write_bytes(_pixels())
        ways = {
            "JPEG": ("image", photo, "/predict", Body(photo.read_bytes(), "image/jpeg")),
            "FP32 tensor": (
                "tensor",
                pixels,
                "/v2/models/resnet18/infer",
                tensor_body(pixels.read_bytes(), (3, 224, 224)),
            ),
        }
        rows = []
        with ours(bundle) as server:
            for way, (kind, data, path, body) in ways.items():
                rows.append(_images_by(server, way, kind, data, path, body, bundle, given))
    return rows


def _images_by(
    server: Server, way: str, kind: str, data: Path, path: str, body: Body, bundle: Path, given: argparse.Namespace
) -> Row:
    tries = {batch: _bare_loop(bundle, data, kind, batch, given.seconds) for batch in IMAGE_BATCHES}
    best = max(tries, key=lambda batch: tries[batch]["rate"])
    _check_scores(server, data, kind, tries[best]["output"])
    if (status := post(server.url(path), body)[0]) != 200:
        raise BenchError(f"{path} answers {status} to a {way}")
    seconds = max(given.seconds, IMAGE_SECONDS)

    def ours_a_second(limit: float) -> float:
        found = saturated(server.worker_addresses(), path, body, connections=IMAGE_CLIENTS, seconds=limit)
        if found["other"] or found["shed"]:
            raise BenchError(f"{path}: {found['shed']} shed, {found['other']} otherwise not answered")
        return found["served_a_second"]

    ours_a_second(WARM_UP_S)
    rates, bare = [], []
    for _ in range(given.rounds):
        rates.append(ours_a_second(seconds))
        bare.append(_bare_loop(bundle, data, kind, best, seconds)["rate"])
    mine, other = statistics.median(rates), statistics.median(bare)
    note = f"{mine:.1f} / {other:.1f} a second, its best batch is {best}"
    figure = f"ResNet18, {way}: images a second, ours / bare PyTorch"
    command = f"open_loop.py --connections {IMAGE_CLIENTS} to both workers' {path}; bare_loop.py --processes {WORKERS}"
    runs = f"{given.rounds} x {seconds:g} s"
    return Row("images", figure, mine / other, "x", IMAGE_BAR, note, command, runs, at_least=True)


def _check_scores(server: Server, data: Path, kind: str, expected: Sequence[float]) -> None:
    """Raise BenchError unless the service gives an image the scores that the bare loop's model has for it."""
    content = data.read_bytes()
    body = tensor_body(content, (3, 224, 224)) if kind == "tensor" else encoded_image_body(content)
    status, answer, _ = post(server.url("/v2/models/resnet18/infer"), body)
    if status != 200:
        raise BenchError(f"/v2/models/resnet18/infer answers {status} {answer[:200]!r}")
    scores = json.loads(answer)["outputs"][0]["data"]
    if len(scores) != len(expected) or max(abs(a - b) for a, b in zip(scores, expected, strict=True)) > 1e-3:
        raise BenchError("/v2/models/resnet18/infer answers other scores than the model has")


def tensor_body(data: bytes, shape: Sequence[int]) -> Body:
    """A request of the Open Inference Protocol with one row of float32 as bytes behind the JSON."""
    described = {"name": "input", "datatype": "FP32", "shape": [1, *shape]}
    return _binary_body({**described, "parameters": {"binary_data_size": len(data)}}, data)


def encoded_image_body(data: bytes) -> Body:
    """A request of the Open Inference Protocol with one encoded image, its length before it."""
    data = len(data).to_bytes(4, "little") + data
    described = {"name": "input", "datatype": "BYTES", "shape": [1]}
    return _binary_body({**described, "parameters": {"binary_data_size": len(data)}}, data)


def _binary_body(described: Mapping[str, object], data: bytes) -> Body:
    head = json.dumps({"inputs": [described]}).encode()
    return Body(head + data, "application/octet-stream", header_length=len(head))


def _bare_loop(bundle: Path, data: Path, kind: str, batch: int, seconds: float) -> dict[str, float | list[float]]:
    command = [sys.executable, str(ROOT / "benchmarks" / "bare_loop.py"), str(bundle), str(data), "--kind", kind]
    command += ["--batch", str(batch), "--seconds", str(seconds), "--processes", str(WORKERS)]
    return json.loads(report.run(command, seconds + 120).splitlines()[-1])


def _resnet18(folder: Path) -> Path:
    made = folder / "resnet18"
    report.run([sys.executable, str(ROOT / "bundles" / "resnet18" / "make.py"), str(made)], 300)
    found = sorted(made.rglob("manifest.yaml"))
    if len(found) != 1:
        raise BenchError(f"bundles/resnet18/make.py made {len(found)} bundles, not one")
    return found[0].parent


def _photo() -> bytes:
    """A JPEG of 500 x 375 pixels, as photos in data sets are, with shapes and noise."""
    import numpy
    from PIL import Image

    draw = numpy.random.default_rng(0)
    across, down = numpy.meshgrid(numpy.arange(500), numpy.arange(375))
    waves = [127 + 90 * numpy.sin(across / period + down / (period + 7)) for period in (23, 31, 47)]
    pixels = numpy.stack(waves, axis=-1) + draw.normal(0, 8, (375, 500, 3))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype("uint8")).save(file, "JPEG", quality=85)
    return file.getvalue()


def _pixels() -> bytes:
    import numpy

    return numpy.random.default_rng(0).normal(0, 1, (3, 224, 224)).astype("float32").tobytes()


def measure_start(given: argparse.Namespace) -> list[Row]:
    """From the start of the process to the first 200 of `GET /health`, with compiled modules, as in the image."""
    # The service compiles none of its own modules, the first start those of its packages.
    compileall.compile_dir(ROOT / "service" / "model_server", quiet=1)
    with ours():
        pass
    seconds = []
    for _ in range(START_RUNS):
        with ours() as server:
            seconds.append(server.seconds_to_ready)
    note = f"{min(seconds):.2f}-{max(seconds):.2f} s"
    middle = statistics.median(seconds)
    return [Row("start", "start to ready", middle, "s", START_BAR_S, note, "python -m model_server", str(START_RUNS))]


BENCHMARKS: Mapping[str, Callable[[argparse.Namespace], list[Row]]] = {
    "throughput": measure_throughput,
    "tail": measure_tail,
    "overload": measure_overload,
    "memory": measure_memory,
    "images": measure_images,
    "start": measure_start,
}
# Rows about one peer are replaced one peer at a time.
ORDER = [
    *(f"throughput {name}" for name in PEER_NAMES),
    *(f"tail {name}" for name in ("ours", *PEER_NAMES)),
    *(name for name in BENCHMARKS if name not in ("throughput", "tail")),
]


@contextlib.contextmanager
def _unmeasured(rows: list[Row], benchmark: str, figure: str, unit: str, bar: float | None) -> Iterator[None]:
    """Where a peer can't be measured, a row that says why."""
    try:
        yield
    except BenchError as error:
        rows.append(Row(benchmark, figure, None, unit, bar, f"not measured: {error}", "-", "0"))


def versions(name: str) -> list[str]:
    """The packages that make a peer, as its requirements pin them."""
    pins = (PEERS / name / "requirements.txt").read_text().splitlines()
    return [pin for package in PACKAGES[name] for pin in pins if re.match(rf"{package}==", pin)]


def _first_request(bundle: Path) -> Body:
    example = json.loads((bundle / "examples.json").read_text())["examples"][0]
    return Body(json.dumps(example["request"]).encode())


def facts() -> dict[str, str]:
    """What the figures were measured on; a load before the start makes them doubtful."""
    return {
        **machine(),
        "Python": sys.version.split()[0],
        "PyTorch": importlib.metadata.version("torch"),
        "load before": f"{os.getloadavg()[0]:.2f}",
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Exit status: 0 every bar met, 1 a bar missed, 2 something could not be measured.",
    )
    parser.add_argument("--only", action="append", choices=list(BENCHMARKS), help="may be repeated; default: all")
    parser.add_argument(
        "--peers", nargs="*", choices=PEER_NAMES, default=list(PEER_NAMES), help="beside whom; default: all of them"
    )
    parser.add_argument("--seconds", type=float, default=3, help="of each round, whole seconds for wrk (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds, of which the median counts (%(default)s)")
    parser.add_argument("--overload-seconds", type=float, default=60, help="of the overload (%(default)s)")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser.add_argument(
        "--environments",
        type=Path,
        default=cache / "appliance-peers",
        help="where the peers' virtual environments are, or are made; about 6 GB (%(default)s)",
    )
    parser.add_argument("--reports", type=Path, default=ROOT / "reports", help="%(default)s")
    parser.add_argument("--document", type=Path, default=ROOT / "docs" / "benchmarks.md", help="%(default)s")
    given = parser.parse_args(arguments)
    if given.seconds < 1 or given.rounds < 1 or given.overload_seconds < 1:
        parser.error("--seconds, --rounds and --overload-seconds must be at least 1")
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    return report.measure(
        BENCHMARKS,
        given,
        figures=given.reports / "service_bench.json",
        order=ORDER,
        marks=MARKS,
        where=facts(),
        command=shlex.join(["benchmarks/service.py", *(sys.argv[1:] if arguments is None else arguments)]),
    )


if __name__ == "__main__":
    sys.exit(main())
