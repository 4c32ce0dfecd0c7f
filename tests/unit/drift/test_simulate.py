"""The simulator: rows as in training, into a topic or to the appliance."""

from __future__ import annotations

import http.server
import itertools
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import threading

import pytest
from drift import simulate
from drift.reference import parse
from drift_box import SERVICE, reference, wait_until


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "drift.simulate", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(SERVICE)},
        capture_output=True,
        text=True,
        timeout=300,
    )


def measured(values):
    """The feature of a reference that was made from values."""
    ordered = sorted(values)
    edges = [ordered[len(ordered) * tenth // 10] for tenth in range(1, 10)]
    content = {
        **{"name": "x", "center": 0, "scale": 1, "mean": statistics.fmean(values), "std": statistics.stdev(values)},
        **{"minimum": ordered[0], "maximum": ordered[-1], "edges": edges, "ratios": [0.1] * 10},
    }
    return parse(json.dumps({"features": [content]}).encode()).features[0]


@pytest.mark.parametrize("kind", ["uniform", "normal", "skewed"])
def test_what_is_drawn_looks_like_training(kind):
    generator = random.Random(1)
    make = {
        "uniform": lambda: generator.uniform(-1.5, 1.5),
        "normal": lambda: generator.gauss(5, 2),
        "skewed": lambda: generator.expovariate(3),
    }[kind]
    feature = measured([make() for _ in range(20_000)])
    values = [simulate.draw(feature, generator) for _ in range(20_000)]
    # Drift is reported from a quarter of a standard deviation on.
    assert abs(statistics.fmean(values) - feature.mean) < 0.05 * feature.std
    assert statistics.stdev(values) == pytest.approx(feature.std, rel=0.1)
    assert min(values) >= feature.minimum and max(values) <= feature.maximum
    for low, high in itertools.pairwise([float("-inf"), *feature.edges, float("inf")]):
        assert sum(low <= value < high for value in values) == pytest.approx(2000, abs=200)


def test_a_shift_is_in_standard_deviations_and_of_one_feature():
    known = parse(json.dumps(reference()).encode())
    plain = list(itertools.islice(simulate.rows(known, {}, seed=4), 100))
    shifted = list(itertools.islice(simulate.rows(known, {"x1": 2.0}, seed=4), 100))
    assert [row["x2"] for row in shifted] == [row["x2"] for row in plain]
    assert [row["x1"] for row in shifted] == pytest.approx([row["x1"] + 2 * 0.866 for row in plain])


def test_training_rows_reach_the_service(box, kafka):
    box.configure(kafka.address)
    bundle = box.bundle()
    box.make_live("blue", bundle)
    box.start()
    done = run("training", "--config", box.config, "--bundle", bundle, "--rows", 2000, "--seed", 1)
    assert (done.returncode, done.stdout) == (0, "2000 of 2000 rows of simplemodel 1.0.0 are in the topic rows\n")

    def rows_arrived():
        return box.rows() == 2000

    wait_until(rows_arrived)
    done = run("training", "--bootstrap", kafka.address, "--topic", "rows", "--bundle", bundle, "--rows", 10)
    assert done.returncode == 0

    def more_arrived():
        return box.rows() == 2010

    wait_until(more_arrived)


class Appliance(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.seen.append((self.path, json.loads(body)["data"]))
        self.send_response(503 if len(self.server.seen) in self.server.failing else 200)
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")


@pytest.fixture
def appliance():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Appliance)
    server.seen, server.failing = [], set()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_without_a_broker_it_gives_up(box, monkeypatch, capsys):
    monkeypatch.setattr(simulate, "_ANSWER_SECONDS", 0.3)
    bundle = box.bundle()
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setattr(
            sys, "argv", ["simulate", "training", f"--bundle={bundle}", f"--bootstrap={address}", "--topic=rows"]
        )
        assert simulate.main() == 1
    assert f"no answer from Kafka at {address}" in capsys.readouterr().err


def test_traffic_is_predictions_with_the_shift_that_was_asked_for(box, appliance):
    done = run(
        *("traffic", "--url", appliance.url, "--bundle", box.bundle(), "--rate", 200, "--minutes", 1 / 60),
        *("--shift", 3, "--feature", "x1", "--seed", 1),
    )
    # On a busy machine it takes longer than a second, after which it tells how far it is.
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "200 requests: 200 200")
    assert {path for path, _ in appliance.seen} == {"/v1/model/simplemodel/predict"}
    x1, x2 = zip(*(row for _, [row] in appliance.seen), strict=True)
    assert statistics.fmean(x1) == pytest.approx(3 * 0.866, abs=0.3)
    assert statistics.fmean(x2) == pytest.approx(0, abs=0.3)


def test_a_request_may_bring_many_rows(box, appliance):
    asked = ("traffic", "--url", appliance.url, "--bundle", box.bundle(), "--rate", 100, "--minutes", 0.1 / 60)
    done = run(*asked, "--batch", 3, "--seed", 1)
    assert (done.returncode, done.stdout) == (0, "10 requests: 10 200\n")
    together = [row for _, rows in appliance.seen for row in rows]
    assert [len(rows) for _, rows in appliance.seen] == [3] * 10
    appliance.seen.clear()
    run(*asked, "--seed", 1)
    assert together[:10] == [row for _, [row] in appliance.seen]


def test_answers_that_are_none_are_told(box, appliance):
    appliance.failing = {2, 3}
    done = run("traffic", "--url", appliance.url, "--bundle", box.bundle(), "--rate", 100, "--minutes", 0.1 / 60)
    assert (done.returncode, done.stdout) == (1, "10 requests: 8 200, 2 503\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--feature", "x9"], "the model has the features x1, x2"),
        (["--model", "other"], "it has one for: simplemodel"),
        (["--url", "localhost"], "must begin with http:// or https://"),
        (["--rate", "0"], "must be above 0"),
        (["--batch", "0"], "must be at least 1"),
        (["--bundle", "/nowhere"], "/nowhere/manifest.yaml can't be read"),
    ],
)
def test_a_wrong_argument_is_explained(box, arguments, message):
    done = run("traffic", "--bundle", box.bundle(), *arguments)
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr
