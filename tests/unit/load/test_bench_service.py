"""What the service's benchmark computes and reads; the measuring itself needs an idle machine."""

import importlib.util
import itertools
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import open_loop, servers
from benchmarks.generators import Body, Closed, paced, parse_ab, parse_wrk, saturated
from benchmarks.processes import Process, Sample, cpu_between, family, parse_pss, parse_stat
from benchmarks.report import BenchError, Row, merge, number

ROOT = Path(__file__).resolve().parents[3]
SPECIFICATION = importlib.util.spec_from_file_location("bench_service", ROOT / "benchmarks" / "service.py")
bench = importlib.util.module_from_spec(SPECIFICATION)
sys.modules["bench_service"] = bench
SPECIFICATION.loader.exec_module(bench)

ANSWERS_EVERYTHING = """
import http.server, sys, time
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        refused = Handler.count % 4 == 3
        Handler.count += 1
        self.send_response(503 if refused else 200)
        if refused and "--no-retry" not in sys.argv:
            self.send_header("Retry-After", "1")
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")
    def log_message(self, *_): pass
Handler.count = 0
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_address[1], flush=True)
server.serve_forever()
"""


@pytest.fixture
def server(request, tmp_path):
    command = [sys.executable, "-c", ANSWERS_EVERYTHING, *getattr(request, "param", [])]
    process = Process(command, os.environ, tmp_path, tmp_path / "log")
    try:
        while not (port := process.output().strip()):
            process.check()
        yield f"127.0.0.1:{port}"
    finally:
        process.stop()


def rounds(rate, cpu_us, lost=0):
    found = bench.Rounds()
    for factor in (0.5, 1, 3):
        answered = int(rate * factor)
        found.runs.append(Closed(1.0, answered, lost, 0))
        found.cpu_seconds.append(answered * cpu_us / 1e6)
    return found


def test_ratios_are_of_medians_and_have_their_bars():
    rows = bench.throughput_rows("fastapi", {64: (rounds(2000, 40), rounds(1000, 100))}, "3 x 1 s")
    assert [(row.value, row.bar, row.verdict) for row in rows] == [
        (2.0, 1.3, "PASS"),
        (pytest.approx(0.4), 0.8, "PASS"),
    ]
    slow = bench.throughput_rows("fastapi", {64: (rounds(1200, 90), rounds(1000, 100, lost=2))}, "3 x 1 s")
    assert [row.verdict for row in slow] == ["MISS", "MISS"]
    assert "fastapi lost 6" in slow[0].note


def test_a_peer_that_serves_nothing_has_no_ratio():
    rows = bench.throughput_rows("flask", {64: (rounds(1000, 40), rounds(0, 0))}, "3 x 1 s")
    assert [(row.value, row.verdict) for row in rows] == [(None, "-"), (None, "-")]


def test_overload_is_judged_on_every_promise():
    load = {
        "served_a_second": 95.0,
        "served_p50_ms": 300.0,
        "shed": 100,
        "other": 0,
        "shed_p50_ms": 1.0,
        "shed_p99_ms": 20.0,
        "lag_p99_ms": 1.0,
    }
    good = bench.Overload(100.0, 200.0, load, [0.01] * 100, 0, [200.0] * 20)
    assert {row.verdict for row in bench.overload_rows([good], 60)} == {"PASS"}
    shed = {**load, "served_a_second": 80.0, "other": 1, "shed_p99_ms": 60.0}
    bad = bench.Overload(100.0, 200.0, shed, [0.2] * 100, 3, [200.0] * 10 + [300.0] * 10)
    assert {row.verdict for row in bench.overload_rows([bad], 60)} == {"MISS"}
    # One bad run of three is enough, but for what was served: that is the median.
    rows = bench.overload_rows([good, bad, good], 60)
    assert [row.verdict for row in rows] == ["PASS", *["MISS"] * 6]


def test_answers_before_and_after_the_counted_time_make_no_rate():
    for begins, ends in ((-60.0, -1.0), (60.0, 61.0)):
        load = open_loop.Load([], b"", seconds=ends - begins, closed=True, warm_up=begins)
        load.record("200", load.start)
        assert load.figures(ends - begins)["served"] == 1
        assert load.figures(ends - begins)["served_a_second"] == 0
    load = open_loop.Load([], b"", seconds=60.0, closed=True, warm_up=-30.0)
    load.record("200", load.start)
    assert load.figures(60.0)["served_a_second"] == 1 / 60


def test_growth_leaves_the_warm_up_out():
    growth, first, last = bench.grown([100.0, *[200.0] * 8, 210.0])
    assert (round(growth, 3), first, last) == (5.0, 200.0, 210.0)


def test_due_times_are_at_the_rate():
    due = list(open_loop.due_times(500, 20))
    assert len(due) == pytest.approx(10_000, rel=0.05)
    assert all(earlier < later for earlier, later in itertools.pairwise(due)) and due[-1] < 20


def test_paced_counts_what_is_refused(server):
    found = paced([server], "/predict", Body(b"{}"), rate=100, seconds=1)
    assert found["sent"] == found["served"] + found["shed"]
    assert found["other"] == 0 and found["shed"] > 0
    assert found["served"] == pytest.approx(3 * found["shed"], abs=4)


@pytest.mark.parametrize("server", [["--no-retry"]], indirect=True)
def test_a_refusal_without_retry_after_is_none(server):
    found = paced([server], "/predict", Body(b"{}"), rate=100, seconds=1)
    assert found["shed"] == 0 and found["other"] > 0


def test_nobody_there_is_told():
    found = paced(["unix:/nothing/there"], "/predict", Body(b"{}"), rate=50, seconds=1)
    assert found["served"] == 0 and found["other"] == found["sent"] > 0


def test_saturated_keeps_connections_busy(server):
    found = saturated([server], "/predict", Body(b"{}"), connections=4, seconds=1)
    assert found["served"] > 20 and found["other"] == 0


def test_wrk_and_ab_are_read():
    line = json.dumps({"seconds": 2, "requests": 100, "refused": 10, "broken": 1})
    assert parse_wrk(f"Running\n{line}\n").rate == 45
    with pytest.raises(BenchError, match="no summary"):
        parse_wrk("unable to connect")
    output = "Complete requests:      10\nFailed requests:        1\nNon-2xx responses:      2\n"
    found = parse_ab(output, "Percentage served,Time in ms\n50,1.5\n99,4.5\n")
    assert (found.requests, found.failed, found.p50_ms, found.p99_ms) == (10, 3, 1.5, 4.5)
    with pytest.raises(BenchError, match="Failed requests"):
        parse_ab("nothing", "")


def test_processes_of_a_server_are_all_counted():
    stat = "7 (a b) c) S 1 7 7 0 -1 0 0 0 0 0 250 50 0 0 20 0"
    assert parse_stat(stat) == Sample(7, 1, 7, 300 / os.sysconf("SC_CLK_TCK"))
    assert parse_stat("7 (x) Z 1 7 7 0 -1 0 0 0 0 0 1 1 0 0") is None
    samples = [Sample(10, 1, 10, 1.0), Sample(11, 10, 10, 2.0), Sample(12, 11, 12, 3.0), Sample(99, 1, 99, 9.0)]
    assert [sample.pid for sample in family(samples, 10)] == [10, 11, 12]
    after = [Sample(10, 1, 10, 1.5), Sample(13, 10, 10, 0.25)]
    assert cpu_between(samples, after) == 0.75
    assert parse_pss("Rss: 9 kB\nPss:                2048 kB\n") == 2.0


def test_rows_keep_their_order_and_replace_their_own():
    def row(benchmark, value):
        return Row(benchmark, "x", value, "x", None, "", "", "1")

    merged = merge([row("b", 1), row("gone", 1), row("a", 1)], [row("b", 2)], ["a", "b"])
    assert [(each.benchmark, each.value) for each in merged] == [("a", 1), ("b", 2)]
    assert [number(value) for value in (3.0, 0.1234, 123.456)] == ["3", "0.123", "123.5"]


def test_a_tensor_body_says_where_its_bytes_begin():
    body = bench.tensor_body(b"\0" * 8, (2,))
    head = json.loads(body.data[: body.header_length])
    assert head["inputs"][0]["parameters"]["binary_data_size"] == len(body.data) - body.header_length == 8


def test_every_peer_has_pinned_versions():
    for name in bench.PEER_NAMES:
        assert all("==" in pin for pin in bench.versions(name)) and bench.versions(name)


@pytest.mark.parametrize(
    ("given", "patience", "fault"),
    [
        ([503, 503, 200], 10.0, None),
        ([503], 0.0, "answers 503"),
        ([503], 0.1, "isn't ready after 0.1 s"),
        # Whoever is patient with a full queue isn't with anything else.
        ([503, 500], 10.0, "answers 500"),
    ],
)
def test_a_queue_that_is_still_full_is_waited_for(monkeypatch, given, patience, fault):
    _, expected = servers.simplemodel_example()
    statuses = itertools.chain(given, itertools.repeat(given[-1]))
    monkeypatch.setattr(servers, "post", lambda *_: (next(statuses), json.dumps({"output": expected}).encode(), {}))
    process = SimpleNamespace(started=0.0, check=lambda: None, output=lambda: "")
    server = servers.Server("peer", process, port=1, path="/predict", seconds_to_ready=0)
    if fault:
        with pytest.raises(BenchError, match=fault):
            servers.check_answer(server, patience)
    else:
        servers.check_answer(server, patience)
