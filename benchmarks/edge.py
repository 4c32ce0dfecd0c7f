#!/usr/bin/env python3
"""Measure what the routing decision costs nginx: a table, `reports/edge_bench.json`, a part of `docs/benchmarks.md`.

The configuration of the role `edge` beside the same one with a fixed upstream, in turns. Needs no appliance, but nginx,
ansible and wrk, two cores, and an idle machine.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shlex
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "service"), str(ROOT / "tests" / "integration")]

from edge_box import COLOURS, PATH, WORKERS, Edge  # noqa: E402

from benchmarks import report  # noqa: E402
from benchmarks.generators import WARM_UP_S, Body, require, wrk  # noqa: E402
from benchmarks.processes import Process  # noqa: E402
from benchmarks.report import BenchError, Row, machine  # noqa: E402
from benchmarks.servers import Server, ours, simplemodel_example  # noqa: E402
from benchmarks.service import Rounds  # noqa: E402

MARKS = ("<!-- edge-bench:begin, written by `make bench` -->", "<!-- edge-bench:end -->")
COST_BAR = 3.0
CONNECTIONS = 32
SITUATIONS = {
    "blue is live": {"live": "blue"},
    "green is live": {"live": "green"},
    "canary at 25 %": {"live": "blue", "split": 25},
}
BACKEND = """
worker_processes 1;
pid {directory}/backend.pid;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    keepalive_requests 1000000000;
    keepalive_timeout 1h;
    default_type application/json;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
{servers}
}}
"""
BACKEND_COLOUR = """
    server {{
{listens}        add_header X-Model-Colour {colour};
        add_header X-Model-Version 1.0.0;
        return 200 '{{"output": 0.65}}';
    }}
"""
# What decides about production's requests.
_DECISION = re.compile(r"^( +)location / \{\n.*?^\1\}\n", re.MULTILINE | re.DOTALL)


def fixed_upstream(configuration: str, colour: str) -> str:
    """The same configuration without a decision: no file is looked at, nobody is drawn, `colour` gets everything.

    Raises BenchError where the configuration doesn't have what is replaced here.
    """
    before, server, production = configuration.partition("default_server;")
    # nginx wants each variable to be set somewhere.
    rest = "location = /undecided { set $appliance_track live; }"
    location = f"location / {{ proxy_pass http://model_{colour}; }} {rest}"
    production, removed = _DECISION.subn(rf"\1{location}\n", production)
    if removed != 1:
        raise BenchError(f"the configuration decides in {removed} places instead of one")
    variable = '"routed":"$appliance_routed"'
    if variable not in before:
        raise BenchError(f"the configuration has no {variable!r} any more")
    return before.replace(variable, f'"routed":"{colour}"') + server + production


def one_upstream(configuration: str, colour: str) -> str:
    """The same decision, whatever comes of it: `colour` gets what either would.

    That a canary's requests are spread over two upstreams and their connections isn't what the decision costs. Raises
    BenchError as above.
    """
    for other in COLOURS:
        if f"proxy_pass http://model_{other};" not in configuration:
            raise BenchError(f"the configuration doesn't send anything to model_{other} any more")
        configuration = configuration.replace(f"proxy_pass http://model_{other};", f"proxy_pass http://model_{colour};")
    return configuration


@contextmanager
def nothing(directory: Path) -> Iterator[dict[str, Path]]:
    """Two colours that are an nginx that only answers; the directories of their sockets, by colour."""
    sockets = {colour: directory / colour for colour in COLOURS}
    servers = []
    for colour, folder in sockets.items():
        folder.mkdir()
        listens = "".join(f"        listen unix:{folder}/worker-{number}.sock;\n" for number in range(WORKERS))
        servers.append(BACKEND_COLOUR.format(colour=colour, listens=listens))
    file = directory / "backend.conf"
    file.write_text(BACKEND.format(directory=directory, servers="".join(servers)))
    command = ["nginx", "-c", str(file), "-e", str(directory / "backend-error.log"), "-g", "daemon off;"]
    process = Process(command, {**os.environ, "PATH": PATH}, directory, directory / "backend.log")
    try:
        yield sockets
    finally:
        process.stop()


@contextmanager
def model_service(directory: Path) -> Iterator[dict[str, Path]]:
    """One model service in place of both colours; the directories of their sockets, by colour."""
    with ours() as server:
        yield dict.fromkeys(COLOURS, server.sockets)


@dataclass
class Side:
    """One of the two configurations, running, and what it did in each round."""

    edge: Edge
    server: Server
    rounds: Rounds = field(default_factory=Rounds)

    def measure(self, body: Body, seconds: float) -> None:
        """Measure one more round."""
        self.rounds.add(self.server, body, CONNECTIONS, seconds)
        # It grows by some hundred MB in each round.
        os.truncate(self.edge.directory / "log" / "prod_access.log", 0)


@contextmanager
def side(edge: Edge, *prefix: str) -> Iterator[Side]:
    """One of the two, running; `prefix` is put before nginx's command."""
    with edge.running(*prefix) as process:
        yield Side(edge, Server("nginx", process, edge.port, "/predict", 0.0))


def measure_bare(given: argparse.Namespace) -> list[Row]:
    """The decision where all else costs next to nothing: nginx on a core of its own, the load on another."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        raise BenchError("one core isn't enough: the load needs another one than nginx")
    try:
        # The generator and what is behind nginx inherit it.
        os.sched_setaffinity(0, cores[1:2])
        return _measure("bare", nothing, given, "taskset", "-c", str(cores[0]))
    finally:
        os.sched_setaffinity(0, cores)


def measure_service(given: argparse.Namespace) -> list[Row]:
    """The decision in front of the model service, all on the same cores, as on an appliance."""
    return _measure("service", model_service, given)


def _measure(
    benchmark: str,
    behind: Callable[[Path], AbstractContextManager[dict[str, Path]]],
    given: argparse.Namespace,
    *prefix: str,
) -> list[Row]:
    require("wrk")
    for program in ("nginx", "ansible"):
        if shutil.which(program, path=PATH) is None:
            raise BenchError(f"{program} isn't there: run `make environment programs`")
    body, _ = simplemodel_example()
    rows = []
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/var/tmp") as folder, behind(Path(folder)) as sockets:
        routed, fixed = (Edge(Path(folder) / name) for name in ("routed", "fixed"))
        for edge in (routed, fixed):
            edge.configuration = edge.configuration.replace("worker_processes auto;", "worker_processes 1;")
            for colour in COLOURS:
                (edge.run / colour).rmdir()
                (edge.run / colour).symlink_to(sockets[colour])
        whole = {edge: edge.configuration for edge in (routed, fixed)}
        for situation, state in SITUATIONS.items():
            print(f"  {situation} …", flush=True)
            routed.route(**state)
            routed.configuration = one_upstream(whole[routed], state["live"])
            fixed.configuration = fixed_upstream(whole[fixed], state["live"])
            with side(routed, *prefix) as mine, side(fixed, *prefix) as other:
                for each in (mine, other):
                    wrk(each.server.url(), body, CONNECTIONS, WARM_UP_S)
                for number in range(given.rounds):
                    for each in (mine, other) if number % 2 else (other, mine):
                        each.measure(body, given.seconds)
            runs = f"{given.rounds} x {given.seconds:g} s"
            rows.append(cost_row(benchmark, situation, mine.rounds, other.rounds, runs))
    return rows


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """Where the median lies in 95 of 100 such samples, whatever their distribution: two of the values, by their ranks.

    The normal approximation of the binomial ranks, good from some ten values on (Conover, Practical Nonparametric
    Statistics, 3.2).
    """
    ordered = sorted(values)
    rank = max(0, math.floor((len(ordered) - 1.96 * math.sqrt(len(ordered))) / 2))
    return ordered[rank], ordered[-1 - rank]


def cost_row(benchmark: str, situation: str, routed: Rounds, fixed: Rounds, runs: str) -> Row:
    """The row of pairs of rounds, with the decision and without. Raises BenchError where a request was lost."""
    if lost := routed.lost + fixed.lost:
        raise BenchError(f"{lost} requests had no good answer")
    costs = [100 * (1 - mine.rate / other.rate) for mine, other in zip(routed.runs, fixed.runs, strict=True)]
    low, high = median_interval(costs)
    note = f"95 % interval {low:.1f} to {high:.1f} %; {routed.rate:,.0f} / {fixed.rate:,.0f} a second; "
    note += f"nginx {routed.cpu_us:.1f} / {fixed.cpu_us:.1f} µs a request"
    figure = f"routing, {TITLES[benchmark]}, {situation}: fewer requests"
    command = f"wrk -t1 -c{CONNECTIONS} -s benchmarks/post.lua …/predict, {TITLES[benchmark]}; one nginx worker"
    return Row(benchmark, figure, statistics.median(costs), "%", COST_BAR, note, command, runs)


TITLES = {"bare": "nothing behind nginx", "service": "the model service behind nginx"}
BENCHMARKS = {"bare": measure_bare, "service": measure_service}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Exit status: 0 every bar met, 1 a bar missed, 2 something could not be measured.",
    )
    parser.add_argument("--only", action="append", choices=list(BENCHMARKS), help="may be repeated; default: all")
    parser.add_argument("--seconds", type=float, default=1, help="of each round, whole seconds for wrk (%(default)s)")
    parser.add_argument(
        "--rounds",
        type=int,
        default=100,
        # Each side is first in half of them.
        help="pairs of rounds, of which the median counts, an even number (%(default)s)",
    )
    parser.add_argument("--reports", type=Path, default=ROOT / "reports", help="%(default)s")
    parser.add_argument("--document", type=Path, default=ROOT / "docs" / "benchmarks.md", help="%(default)s")
    given = parser.parse_args(arguments)
    if given.seconds < 1 or given.rounds < 10 or given.rounds % 2:
        parser.error("--seconds must be at least 1, --rounds even and at least 10")
    return given


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    return report.measure(
        BENCHMARKS,
        given,
        figures=given.reports / "edge_bench.json",
        order=list(BENCHMARKS),
        marks=MARKS,
        where={**machine(), "load before": f"{os.getloadavg()[0]:.2f}"},
        command=shlex.join(["benchmarks/edge.py", *(sys.argv[1:] if arguments is None else arguments)]),
    )


if __name__ == "__main__":
    sys.exit(main())
