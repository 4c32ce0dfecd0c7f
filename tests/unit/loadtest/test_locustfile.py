"""The locustfile, run by Locust against a real server that knows what it answered."""

from __future__ import annotations

import json
import os
import subprocess
from collections import Counter

import pytest
from answering import LOADTEST, LOCUST, Server

LOCUSTFILE = LOADTEST / "locustfile.py"
pytestmark = pytest.mark.needs("locust")


def load(tmp_path, kinds, examples=({"data": [1]},), **environment):
    """Run Locust for a second; returns the server and what Locust wrote."""
    (tmp_path / "examples.json").write_text(json.dumps({"examples": [{"request": body} for body in examples]}))
    with Server(kinds) as server:
        answer = subprocess.run(
            [
                *(LOCUST, f"--locustfile={LOCUSTFILE}", "--headless", "--skip-log-setup", "--exit-code-on-error=0"),
                *("--users=3", "--spawn-rate=3", "--run-time=1", "--stop-timeout=2"),
            ],
            env={
                **os.environ,
                "PYTHONDONTWRITEBYTECODE": "1",
                "LOADTEST_URL": f"{server.url}/test/predict",
                "LOADTEST_EXAMPLES": str(tmp_path / "examples.json"),
                "LOADTEST_COLOUR": "green",
                "LOADTEST_THINK_SECONDS": "0.02",
                "LOADTEST_TIMEOUT_SECONDS": "1",
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=30,
        )
    assert answer.returncode == 0, answer.stderr
    return server, json.loads(answer.stdout)


def test_examples_are_posted_in_turn_on_held_connections(tmp_path):
    examples = [{"data": [1]}, {"data": "aW1hZ2U="}, {"data": "ü"}]
    server, report = load(tmp_path, ["good"], examples)
    assert report["requests"] == len(server.seen) > 30
    assert (report["failures"], report["errors"]) == (0, {})
    # One connection for each user.
    assert len({address for _, address, _, _ in server.seen}) == 3
    assert {path for _, _, path, _ in server.seen} == {"/test/predict"}
    counts = Counter(json.dumps(json.loads(body)) for _, _, _, body in server.seen)
    assert set(counts) == {json.dumps(example) for example in examples}
    assert max(counts.values()) - min(counts.values()) <= 1
    assert 0.9 < report["duration_seconds"] < 30 and report["start"] <= report["end"]


def test_each_bad_answer_counts_as_what_it_is(tmp_path):
    server, report = load(tmp_path, ["good", "error", "redirect", "html", "blue", "cut", "closed", "garbage"])
    counts = Counter(kind for kind, *_ in server.seen)
    assert report["requests"] == counts.total() > 14
    assert report["failures"] == counts.total() - counts["good"] == sum(report["errors"].values())
    errors = report["errors"]
    assert errors.pop("status 500") == counts["error"]
    assert errors.pop("status 307") == counts["redirect"]
    assert errors.pop("not JSON") == counts["html"] + counts["cut"]
    assert errors.pop("another colour's answer") == counts["blue"]
    assert sum(errors.values()) == counts["closed"] + counts["garbage"]


def test_an_answer_that_doesnt_come_is_counted_too(tmp_path):
    server, report = load(tmp_path, ["slow"])
    assert report["requests"] == len(server.seen) >= 3
    assert report["errors"] == {"TimeoutError": report["requests"]}
    assert 900 < report["p50_ms"] < 1400


def test_quantiles_show_one_slow_answer_in_ten(tmp_path):
    server, report = load(tmp_path, ["good"] * 9 + ["late"])
    assert report["failures"] == 0 and report["requests"] == len(server.seen) > 20
    assert 0 < report["p50_ms"] < 150 < 200 <= report["p95_ms"] <= report["p99_ms"] <= report["max_ms"] < 1000


def test_nothing_to_post_is_an_error(tmp_path):
    (tmp_path / "none").write_text("[]")
    with pytest.raises(AssertionError, match="TypeError"):
        load(tmp_path, ["good"], LOADTEST_EXAMPLES=str(tmp_path / "none"))
