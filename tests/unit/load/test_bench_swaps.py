"""The swaps' benchmark without an appliance: its rows, its tools' counts, the bundle, and how it is placed."""

import asyncio
import json
import os
import subprocess
import sys
import threading
from collections import Counter

import pytest
from mixed_bundles import FACTORS, NAME, QUICK_PATH, SLEEPER_PATH, write_bundle
from mixed_load import Tally
from model_server.bundle import read

from benchmarks import swaps as bench
from benchmarks.generators import Ab, Body, Closed
from benchmarks.report import BenchError
from benchmarks.servers import ours, post

TIMES = {"p50": 4.0, "p95": 6.0, "p99": 9.0, "max": 11.0}


def figures(**more):
    kind = {"clients": 2, "requests": 100, "probes": 0, "failed": 0, "failures": {}, "latency_ms": TIMES}
    return {
        "made": 200,
        "seconds": 601.5,
        "stopped": None,
        "unasked": [],
        "kinds": {name: dict(kind) for name in bench.CLIENTS},
        "tools": {"wrk": {"runs": 3, "requests": 900, "failed": 0, "failures": {}}},
        "wrong_colour": 0,
        "wrong_colour_latest_ms": None,
        "wrong_version": 0,
        "crossing": dict.fromkeys(bench.CLIENTS, (50, 50)),
        "first_new_ms": TIMES,
        "engine_ms": TIMES,
        **more,
    }


def control(failed=7):
    found = figures(made=20, seconds=60.2)
    found["kinds"][bench.THINKING]["failed"] = failed
    return found


def rows(run, of_control=None):
    return {row.figure: row for row in bench.swap_rows(run, of_control or control(), 200)}


def test_a_good_run_passes_every_bar():
    found = rows(figures())
    assert {row.verdict for row in found.values() if row.bar is not None} == {"PASS"}
    assert all(f"failed: {name}" in found for name in (*bench.CLIENTS, "wrk"))
    assert "of 900 in 3 runs" in found["failed: wrk"].note
    lost = found["failed in the control"]
    assert lost.value == 7 and f"{bench.THINKING} 7" in lost.note and "20 reloads" in lost.note


@pytest.mark.parametrize(
    ("changed", "figure"),
    [
        ({"made": 199, "stopped": "not ready"}, "swaps under mixed load"),
        ({"wrong_colour": 1, "wrong_colour_latest_ms": 0.2}, "sent after a switch, answered by the old colour"),
        ({"wrong_version": 1}, "answered in a version that isn't the colour's"),
        (
            {"crossing": dict.fromkeys(bench.CLIENTS, (50, 49))},
            "2 s requests across a switch, not answered well by the old colour",
        ),
        ({"unasked": ["the bake failed"]}, "switches that nobody asked for"),
        ({"engine_ms": TIMES | {"p50": 10.1}}, "switch to first new answer, by the engine, p50"),
        ({"first_new_ms": TIMES | {"p99": 50.1}}, "switch to first new answer, by a client without pauses, p99"),
    ],
)
def test_each_shortcoming_misses_its_own_bar(changed, figure):
    missed = [row.figure for row in rows(figures(**changed)).values() if row.verdict == "MISS"]
    assert missed == [figure]


@pytest.mark.parametrize("group", ["kinds", "tools"])
def test_a_failed_request_of_any_kind_is_a_miss_with_its_reason(group):
    run = figures()
    name = next(iter(run[group]))
    run[group][name] |= {"failed": 1, "failures": {"reset": 1}}
    row = rows(run)[f"failed: {name}"]
    assert row.verdict == "MISS" and "reset 1" in row.note


def test_a_control_that_loses_nothing_is_a_miss():
    assert rows(figures(), control(0))["failed in the control"].verdict == "MISS"


def test_without_a_request_across_a_switch_there_is_no_verdict():
    found = rows(figures(crossing=dict.fromkeys(bench.CLIENTS, (0, 0))))
    assert found["2 s requests across a switch, not answered well by the old colour"].verdict == "-"


def test_what_the_tools_count_as_failed(monkeypatch):
    monkeypatch.setattr(bench, "wrk", lambda *_: Closed(2.0, 95, 3, 2))
    monkeypatch.setattr(bench, "ab", lambda *_: Ab(bench.AB_REQUESTS - 2, 1, 1.0, 2.0))
    tools = bench.tools("http://127.0.0.1:1")
    assert tools["wrk"]() == Tally(1, 100, 5, Counter({"status": 3, "connection": 2}))
    counted = tools["ab -k"]()
    assert (counted.requests, counted.failed) == (bench.AB_REQUESTS, 3)

    def fails(*_):
        raise BenchError("ab: exit status 104")

    monkeypatch.setattr(bench, "ab", fails)
    assert tools["ab -k"]() == Tally(1, 1, 1, Counter({"ab: exit status 104": 1}))


def test_rollbacks_are_timed_where_they_run(tmp_path):
    program = tmp_path / "appliance"
    program.write_text('#!/bin/sh\necho "$@" >>calls\nsleep 0.05\n')
    program.chmod(0o755)
    script = bench.ROLLBACKS.format(count=2, wait=3)
    path = f"{tmp_path}:{os.environ['PATH']}"

    def run():
        command = [sys.executable, "-"]
        environment = os.environ | {"PATH": path}
        return subprocess.run(command, input=script, text=True, capture_output=True, cwd=tmp_path, env=environment)

    seconds = bench.rollback_seconds(run().stdout)
    assert len(seconds) == 2 and all(0.05 <= each < 5 for each in seconds)
    assert (tmp_path / "calls").read_text() == "rollback --json --lock-wait 3\n" * 2
    program.write_text("#!/bin/sh\necho nothing to go back to\nexit 1\n")
    with pytest.raises(BenchError, match="exit status 1: nothing to go back to"):
        bench.rollback_seconds(run().stdout)


@pytest.mark.parametrize(
    ("live", "idle", "deployed", "swaps"),
    [
        (("simplemodel", "1.0.0"), ("simplemodel", "1.1.0"), ["1.0.0", "1.1.0"], 1),
        ((NAME, "1.1.0"), ("simplemodel", "1.1.0"), ["1.0.0"], 0),
        ((NAME, "1.0.0"), (NAME, "1.0.0"), ["1.1.0"], 0),
        ((NAME, "1.1.0"), (NAME, "1.0.0"), [], 0),
    ],
)
def test_both_colours_get_a_version_each(pretend_host, deploys, live, idle, deployed, swaps):
    deploys.host = pretend_host(live, idle, "bake")
    asyncio.run(bench.place(deploys.host, "deploy"))
    assert deploys.versions == deployed
    assert deploys.host.words.count("swap") == swaps
    assert sorted(deploys.host.colours.values()) == [(NAME, version) for version in FACTORS]
    assert deploys.host.rollout is None


def test_both_bundles_are_whole_and_always_the_same(tmp_path):
    for version in FACTORS:
        (tmp_path / "again").mkdir(exist_ok=True)
        one, other = write_bundle(tmp_path, version), write_bundle(tmp_path / "again", version)
        bundle = read(one)
        assert (bundle.name, bundle.version) == (NAME, version)
        assert [model.name for model in bundle.models] == ["quick", "sleeper"]
        assert bundle.digest == read(other).digest


def test_sleepers_keep_nobody_waiting(tmp_path):
    with ours(write_bundle(tmp_path, "1.1.0"), workers=1) as server:
        answers = []
        ask = server.url(SLEEPER_PATH), Body(b'{"data": [1.5]}')
        sleeping = threading.Thread(target=lambda: answers.append(post(*ask)))
        sleeping.start()
        for body in (bench.DEFAULT_BODY, bench.LARGE_BODY):
            status, answer, headers = post(server.url(QUICK_PATH), Body(body))
            assert (status, json.loads(answer)["output"]) == (200, pytest.approx(1.6))
            assert headers["X-Model-Version"] == "1.1.0"
        assert not answers
        sleeping.join()
        assert json.loads(answers[0][1]) == {"output": 1.5}
