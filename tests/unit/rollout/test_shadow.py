"""The real daemon, with stand-ins for both colours' workers and for nginx, which copies requests to it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest
from rollout import compare, shadow
from rollout.routing import Routing, State
from rollout.unixhttp import Answer, ExchangeError, UnixConnection, exchange
from rollout_stand_ins import COLOURS, serve, wait_for

SERVICE = Path(__file__).resolve().parents[3] / "service"
BIO = {"output": {"kind": "classes", "labels": ["a", "b"], "schema": {"type": "object"}}}


class Colour:
    """The workers of a colour. `says` is the body of every answer; while `hangs` is set there is none."""

    def __init__(self, directory, name, asked):
        self.directory, self.name, self.asked = directory, name, asked
        self.status, self.says, self.bio, self.hangs = 200, {"output": 0.5}, BIO, threading.Event()
        self.free = threading.Event()
        self.workers = [serve(str(directory / f"worker-{number}.sock"), self) for number in range(2)]

    def answer(self, handler, body):
        if handler.command == "GET":
            handler.send(200, self.bio)
            return
        worker = Path(handler.server.server_address).name
        self.asked.append((self.name, worker, handler.path, dict(handler.headers), body))
        if self.hangs.is_set():
            self.free.wait(20)
        with contextlib.suppress(OSError):
            handler.send(self.status, self.says, {"X-Model-Version": "1.0.0"})

    def stop(self):
        self.free.set()
        for number, server in enumerate(self.workers):
            server.shutdown()
            server.server_close()
            (self.directory / f"worker-{number}.sock").unlink(missing_ok=True)
        self.workers = []


class Shadow:
    """The daemon in a process of its own, and blue, which is live, beside green."""

    def __init__(self, root):
        self.root, self.asked = root, []
        self.routing = Routing(root / "s/routing", COLOURS)
        (root / "r/shadow").mkdir(parents=True)
        self.colours = {}
        for name in COLOURS:
            (root / "r" / name).mkdir()
            self.colours[name] = Colour(root / "r" / name, name, self.asked)
        self.blue, self.green = (self.colours[name] for name in COLOURS)
        self.process = self.connection = None
        self.make_live("blue")

    def make_live(self, colour):
        self.routing.switch(State(live=colour, since="2026-01-31T12:00:00Z", who="tester", shadow=100))

    def start(self, **settings):
        settings = {
            "state_dir": str(self.root / "s"),
            "runtime_dir": str(self.root / "r"),
            "request_timeout_seconds": 5,
            **settings,
        }
        (self.root / "appliance.json").write_text(json.dumps(settings))
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "rollout.shadow", "--config", str(self.root / "appliance.json")],
            env={**os.environ, "PYTHONPATH": str(SERVICE)},
            stderr=(self.root / "log").open("wb"),
        )
        self.connection = UnixConnection(self.root / "r/shadow/shadow.sock", 10)
        wait_for(lambda: self.log)
        return self

    @property
    def log(self):
        return (self.root / "log").read_text()

    def ask(self, method, target, body=b"", headers=None):
        answer = exchange(self.connection, method, target, body, headers, timeout=10)
        return answer.status, answer.body

    def copy(self, path="/predict", body=b'{"data": [1, 2]}', method="POST", **headers):
        """What nginx sends for a request to `path`; the status of the answer."""
        about = {"X-Shadow-Path": path, "X-Request-ID": "abc", **headers}
        return self.ask(method, "/appliance-shadow", body, about)[0]

    def summary(self):
        status, body = self.ask("GET", "/summary")
        assert status == 200
        return json.loads(body)

    def counts(self, ended=None):
        """The results so far that aren't 0, once `ended` copies have come to one."""

        def results():
            return {key: value for key, value in self.summary().items() if value and key != "started"}

        if ended is not None:
            wait_for(lambda: sum(results().values()) >= ended)
        return results()

    def outcome(self, *arguments, **options):
        """What becomes of one copy."""
        before = self.counts()
        assert self.copy(*arguments, **options) == 204
        after = self.counts(sum(before.values()) + 1)
        [result] = [key for key in after if after[key] != before.get(key)]
        return result

    def stop(self):
        for colour in self.colours.values():
            colour.stop()
        if self.process:
            self.connection.close()
            self.process.kill()
            self.process.wait()


@pytest.fixture
def stage():
    # Socket paths are limited to 107 bytes, and pytest's own temporary directories are long.
    root = Path(tempfile.mkdtemp(prefix="sh-", dir="/tmp"))
    stage = Shadow(root)
    yield stage
    stage.stop()
    shutil.rmtree(root, ignore_errors=True)


def test_answers_agree_up_to_the_tolerance(stage):
    stage.start(shadow_tolerance=0.01)
    assert stage.outcome() == "agree"
    stage.green.says = {"output": 0.509}
    assert stage.outcome() == "agree"
    stage.green.says = {"output": 0.511}
    assert stage.outcome() == "differ"
    assert stage.counts() == {"agree": 2, "differ": 1}


def test_each_colour_gets_what_the_client_sent(stage):
    stage.start()
    long = "x" * 64
    for request_id in ("abc", long):
        headers = {"X-Request-ID": request_id, "Content-Type": "image/png", "X-Request-Timeout": "0.1", "X-Own": "1"}
        assert stage.outcome("/v1/model/digits/predict?a=b", b"\x89PNG\0", **headers) == "agree"
    for name, _, path, headers, body in stage.asked:
        assert name in COLOURS and (path, body) == ("/v1/model/digits/predict?a=b", b"\x89PNG\0")
        headers = {name.lower(): value for name, value in headers.items()}
        assert (headers["content-type"], headers["x-own"], headers["x-request-timeout"]) == ("image/png", "1", "5")
        assert headers["x-request-id"] in ("abc-shadow", "x" * 57 + "-shadow")
        assert "x-shadow-path" not in headers
    # Neither has the other's answer to profit from each time, and each worker has its turn.
    assert [name for name, *_ in stage.asked] == ["blue", "green", "green", "blue"]
    assert [worker for _, worker, *_ in stage.asked] == ["worker-0.sock"] * 2 + ["worker-1.sock"] * 2


def test_statuses(stage):
    stage.start()
    stage.green.says = {"error": "other"}
    for live, idle, result in (
        (200, 500, "differ"),
        (400, 200, "differ"),
        (400, 400, "agree"),
        (503, 200, "shed"),
        (200, 503, "shed"),
        (504, 200, "error_live"),
        (200, 504, "error_idle"),
    ):
        stage.blue.status, stage.green.status = live, idle
        assert stage.outcome() == result, (live, idle)


def test_the_colours_follow_the_routing(stage):
    stage.start()
    stage.green.stop()
    assert stage.outcome() == "error_idle"
    stage.make_live("green")
    assert stage.outcome() == "error_live"
    stage.blue.stop()
    assert stage.outcome() == "error_live"
    os.unlink(stage.routing.current)
    assert stage.outcome() == "error_live"


def test_a_link_is_not_followed(stage):
    stage.start()
    stage.green.stop()
    (stage.green.directory / "worker-0.sock").symlink_to(stage.blue.directory / "worker-0.sock")
    assert stage.outcome() == "error_idle"
    assert [name for name, *_ in stage.asked] == ["blue"]


def test_only_predictions_are_repeated(stage):
    stage.start()
    for path in (
        "/v1/jobs",
        "/v1/jobs?/predict",
        "/v1/model/digits/jobs",
        "/v1/model/../jobs/predict",
        "/v2/repository/index",
        "/predict/",
        "/predict\x7f",
        "",
    ):
        assert stage.copy(path) == 204
    for method in ("GET", "DELETE", "PUT"):
        assert stage.copy("/predict", method=method) == 204
    assert stage.outcome() == "agree" and stage.counts() == {"agree": 1}
    assert [path for _, _, path, *_ in stage.asked] == ["/predict"] * 2


def test_everything_that_predicts_is_repeated():
    from model_server.protocols import prediction_routes

    routes = prediction_routes(models=None)
    assert len(routes) > 10
    for route in routes:
        path = route.rule.replace("<name>", "My_digits-1").replace("<version>", "1.0.0+b")
        asked = compare.prediction(route.method, path)
        assert asked and asked.model == ("My_digits-1" if "<name>" in route.rule else None), path


def test_a_colour_that_hangs_keeps_nobody_waiting(stage):
    stage.start()
    stage.green.hangs.set()
    begin, longest = time.monotonic(), 0.0
    for _ in range(shadow.MOST_COPIES + 40):
        before = time.monotonic()
        assert stage.copy() == 204
        longest = max(longest, time.monotonic() - before)
    assert longest < 1 and time.monotonic() - begin < 5
    assert stage.counts() == {"dropped": 40}
    # At most two at a time, so that the live colour doesn't suffer for it.
    assert len(stage.asked) <= 4
    stage.green.hangs.clear()
    stage.green.free.set()
    assert stage.counts(shadow.MOST_COPIES + 40) == {"agree": shadow.MOST_COPIES, "dropped": 40}
    assert stage.outcome() == "agree"


def test_a_colour_that_hangs_is_given_up(stage):
    stage.start(request_timeout_seconds=0.2)
    stage.green.hangs.set()
    assert stage.outcome() == "error_idle"
    assert "shadow: green gives no answer: no whole answer within 0.2 s" in stage.log


def test_bodies_have_a_limit(stage):
    stage.start()
    stage.blue.hangs.set(), stage.green.hangs.set()
    largest = b"x" * shadow.MOST_BODY_BYTES
    assert stage.copy(body=largest + b"x") == 204
    assert stage.counts() == {"dropped": 1}
    fit = shadow.MOST_BYTES // shadow.MOST_BODY_BYTES
    for _ in range(fit):
        assert stage.copy(body=largest) == 204
    assert stage.counts() == {"dropped": 1}
    assert stage.copy(body=b"x") == 204
    assert stage.counts() == {"dropped": 2}
    for colour in stage.colours.values():
        colour.free.set()
    assert stage.counts(fit + 2) == {"agree": fit, "dropped": 2}
    # The room was given back.
    assert stage.outcome(body=b"x") == "agree"


def send(stage, sent):
    """On a connection of its own, until the daemon closes it."""
    with contextlib.closing(UnixConnection(stage.root / "r/shadow/shadow.sock", 5)) as other:
        other.connect()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            other.sock.sendall(sent)
            other.sock.shutdown(socket.SHUT_WR)
            while other.sock.recv(65536):
                pass


def test_a_broken_connection_costs_nothing(stage):
    stage.start()
    copy = b"POST /appliance-shadow HTTP/1.1\r\nX-Shadow-Path: /predict\r\n"
    for sent in (
        b"nonsense\r\n\r\n",
        copy + b"Content-Length: 100\r\n\r\nshort",
        copy + b"Content-Length: -1\r\n\r\n",
        copy.replace(b"/predict", b"/v1/jobs") + b"Content-Length: 100\r\n\r\nshort",
        copy.replace(b"/predict", b"/v1/jobs") + b"Transfer-Encoding: chunked\r\n\r\n" + copy + b"\r\n",
        b"x" * 200_000,
    ):
        send(stage, sent)
    for _ in range(2):
        assert stage.outcome("/predict?whole") == "agree"
    assert {path for _, _, path, *_ in stage.asked} == {"/predict?whole"}
    assert "Traceback" not in stage.log
    stage.connection.close()
    assert stage.copy(Connection="close") == 204
    assert stage.connection.sock.recv(1) == b""


def test_a_body_that_never_comes_keeps_no_room(stage):
    stage.start()
    head = f"POST / HTTP/1.1\r\nX-Shadow-Path: /predict\r\nContent-Length: {shadow.MOST_BODY_BYTES}\r\n\r\n"
    for _ in range(shadow.MOST_BYTES // shadow.MOST_BODY_BYTES):
        send(stage, head.encode())
    assert stage.outcome() == "agree"


def test_nothing_of_a_client_is_logged(stage):
    stage.start()
    stage.green.stop()
    for number in range(3):
        assert stage.outcome(f"/predict?secret={number}", b"secret", X_Secret="secret", Cookie="secret") == "error_idle"
    first, second = stage.log.splitlines()
    assert first.startswith("appliance: shadow: takes copies at ") and first.endswith(" with a tolerance of 0.001")
    assert second.startswith("appliance: shadow: green gives no answer: there is no worker's socket in ")
    stage.blue.stop()
    assert stage.outcome() == "error_live"
    assert len(stage.log.splitlines()) == 3
    assert "secret" not in stage.log


def test_a_classifier_is_known_by_its_description(stage):
    stage.start()
    stage.blue.says, stage.green.says = {"a": 0.9, "b": 0.1}, {"a": 0.6, "b": 0.4}
    assert stage.outcome("/predictions/digits") == "agree"
    stage.green.says = {"b": 0.6, "a": 0.4}
    assert stage.outcome("/predictions/digits") == "differ"
    # Asked anew for another model: here code of its own makes something else of the classes.
    stage.blue.bio = {"output": {"kind": "classes", "schema": {}}}
    stage.green.says = {"a": 0.6, "b": 0.4}
    assert stage.outcome("/predictions/other") == "differ"
    stage.blue.bio = {"error": "there is no model of that name"}
    assert stage.outcome("/predictions/third") == "error_live"


def test_metrics(stage):
    from prometheus_client.parser import text_string_to_metric_families

    stage.start()
    before = time.time()
    assert abs(stage.summary()["started"] - before) < 30
    assert set(stage.summary()) == {"agree", "differ", "error_live", "error_idle", "shed", "dropped", "started"}
    for answer in (0.5, 0.5005, 3.0):
        stage.green.says = {"output": answer}
        stage.outcome()
    stage.green.says = {"output": "text"}
    assert stage.outcome() == "differ"
    counter, histogram = text_string_to_metric_families(stage.ask("GET", "/metrics")[1].decode())
    assert (counter.name, counter.type) == ("appliance_shadow_requests", "counter")
    results = {sample.labels["result"]: sample.value for sample in counter.samples}
    assert results == {"agree": 2, "differ": 2, "error_live": 0, "error_idle": 0, "shed": 0, "dropped": 0}
    assert (histogram.name, histogram.type) == ("appliance_shadow_distance", "histogram")
    buckets = {s.labels["le"]: s.value for s in histogram.samples if s.name.endswith("_bucket")}
    assert list(buckets.items())[:5] == [("0", 1), ("1e-06", 1), ("1e-05", 1), ("0.0001", 1), ("0.001", 2)]
    assert list(buckets.items())[5:] == [("0.01", 2), ("0.1", 2), ("1", 2), ("10", 3), ("100", 3), ("+Inf", 3)]
    [total] = [s.value for s in histogram.samples if s.name.endswith("_sum")]
    [count] = [s.value for s in histogram.samples if s.name.endswith("_count")]
    assert count == 3 and total == pytest.approx(2.5005)


def test_an_infinite_distance_leaves_the_sum_alone():
    tally = shadow.Tally()
    for distance in (1.0, float("inf")):
        tally.add(shadow.Outcome("differ", distance))
    assert "appliance_shadow_distance_sum 1.0\n" in tally.text()
    assert 'appliance_shadow_distance_bucket{le="100"} 1\n' in tally.text()
    assert 'appliance_shadow_distance_bucket{le="+Inf"} 2\n' in tally.text()


def test_a_start_takes_the_place_of_a_killed_one(stage):
    stage.start()
    stage.process.kill()
    stage.process.wait()
    stage.connection.close()
    stage.start()
    assert stage.outcome() == "agree"
    assert stage.root.joinpath("r/shadow/shadow.sock").stat().st_mode & 0o777 == 0o660


def test_all_ends_when_a_process_that_compares_dies(stage):
    stage.start()
    for _ in range(2):
        assert stage.outcome() == "agree"
    children = Path(f"/proc/{stage.process.pid}/task/{stage.process.pid}/children").read_text().split()
    assert len(children) == 2
    os.kill(int(children[0]), signal.SIGKILL)
    for _ in range(2):
        with contextlib.suppress(OSError, ExchangeError):
            stage.copy()
    assert stage.process.wait(10) == 1
    assert stage.log.splitlines()[-1].endswith("a process that compares has died: everything starts afresh")
    # Not even the other one is left; a process that nobody has waited for has no command line.
    wait_for(lambda: not any(path.read_bytes() for path in Path("/proc").glob(f"{children[1]}/cmdline")))


def test_a_start_without_its_directory_says_what_to_do(stage):
    (stage.root / "r/shadow").rmdir()
    stage.start()
    assert stage.process.wait(10) == 1
    assert "No such file or directory; 'systemd-tmpfiles --create' makes" in stage.log


def answer(body, headers=None):
    return Answer(200, headers or {}, body if isinstance(body, bytes) else json.dumps(body).encode(), False)


def oip(outputs, version, raw=None):
    """An answer of the Open Inference Protocol; its tensors follow as bytes where `raw` is given."""
    head = json.dumps({"model_name": "m", "model_version": version, "outputs": outputs}).encode()
    if raw is None:
        return answer(head)
    return answer(head + raw, {"inference-header-content-length": str(len(head))})


def tensor(data, shape, datatype="FP32", size=None):
    about = {"name": "output", "datatype": datatype, "shape": shape}
    return [about | ({"data": data} if size is None else {"parameters": {"binary_data_size": size}})]


def strings(*values):
    return b"".join(struct.pack("<I", len(value)) + value for value in values)


def classes(label, probability):
    return {"class": label, "probability": probability, "top": [{"class": label, "probability": probability}]}


@pytest.mark.parametrize(
    ("path", "live", "idle", "agree", "distance"),
    [
        ("/predict", {"output": [0.5, 100]}, {"output": [0.5, 100.05]}, True, 0.05),
        ("/predict", {"output": [0.5, 100]}, {"output": [0.502, 100]}, False, 0.002),
        ("/predict", {"output": [0.5, 1.0]}, {"output": [0.5]}, False, None),
        ("/predict", {"output": {"x": [1, "a", None]}}, {"output": {"x": [1, "a", None]}}, True, 0.0),
        ("/predict", {"output": {"x": [1, "a", None]}}, {"output": {"x": [1, "b", None]}}, False, 0.0),
        ("/predict", {"output": True}, {"output": 1}, False, None),
        ("/predict", {"output": {"x": 1}}, {"output": {"y": 1}}, False, None),
        ("/predict", b'{"output": 1}', b'{"output": ' + b"9" * 400 + b"}", False, float("inf")),
        ("/predict", {"output": classes("3", 0.9)}, {"output": classes("3", 0.4)}, True, None),
        ("/predict", {"output": [classes("3", 0.9)]}, {"output": [classes("3", 0.4)]}, True, None),
        ("/predict", {"output": classes("3", 0.9)}, {"output": classes("9", 0.9)}, False, None),
        ("/v1/models/m:predict", {"predictions": [classes("3", 0.9)]}, {"predictions": [classes("3", 1)]}, True, None),
        ("/v1/models/m:predict", {"predictions": [0.1]}, {"predictions": [0.2]}, False, 0.1),
        ("/predict", b"not JSON", b"not JSON", True, None),
        ("/predict", b"not JSON", b"no JSON", False, None),
        ("/predict", b"[" * 100_000, b"[" * 100_000, True, None),
        ("/predict", b'{"output": ' + b"[" * 900 + b"]" * 900 + b"}", b'{"output": 1}', False, None),
        ("/predictions/m", [0.5], [0.5005], True, 0.0005),
        ("/predictions/m", {"output": 0.5}, {"output": 0.6}, False, 0.1),
    ],
)
def test_comparison(path, live, idle, agree, distance):
    asked = compare.prediction("POST", path)
    found = compare.compare(answer(live), answer(idle), asked, classifier=False, tolerance=1e-3)
    assert found.agree is agree
    assert found.distance == (None if distance is None else pytest.approx(distance))


SCORES = [0.1, 0.9, 0.7, 0.3]
TOP = [b"0.900000:1:cat", b"0.100000:0:dog"]


@pytest.mark.parametrize(
    ("live", "idle", "classifier", "agree"),
    [
        (oip(tensor(SCORES, [2, 2]), "1"), oip(tensor(SCORES, [2, 2]), "2"), False, True),
        (oip(tensor(SCORES, [2, 2]), "1"), oip(tensor([0.2, 0.8, 0.6, 0.4], [2, 2]), "2"), False, False),
        (oip(tensor(SCORES, [2, 2]), "1"), oip(tensor([0.2, 0.8, 0.6, 0.4], [2, 2]), "2"), True, True),
        (oip(tensor(SCORES, [2, 2]), "1"), oip(tensor([0.2, 0.8, 0.3, 0.4], [2, 2]), "2"), True, False),
        (oip(tensor(SCORES, [2, 2]), "1"), oip(tensor(SCORES, [4]), "2"), False, False),
        (
            oip(tensor(None, [2, 2], size=16), "1", struct.pack("<4f", *SCORES)),
            oip(tensor(None, [2, 2], size=16), "22", struct.pack("<4f", 0.1004, *SCORES[1:])),
            False,
            True,
        ),
        (
            oip(tensor(None, [2, 2], size=16), "1", struct.pack("<4f", *SCORES)),
            oip(tensor(None, [2, 2], size=16), "22", struct.pack("<4f", 0.12, *SCORES[1:])),
            False,
            False,
        ),
        (
            oip(tensor(None, [1], size=4) * 2, "1", struct.pack("<2f", 0.5, 0.5)),
            oip(tensor(None, [1], size=4) * 2, "2", struct.pack("<2f", 0.5, 0.6)),
            False,
            False,
        ),
        (
            oip(tensor(None, [1, 2], "BYTES", len(strings(*TOP))), "1", strings(*TOP)),
            oip(tensor(["0.600000:0:cat", "0.400000:1:dog"], [1, 2], "BYTES"), "2"),
            True,
            True,
        ),
        (
            oip(tensor(["0.6:0:cat", "0.4:1:dog"], [1, 2], "BYTES"), "1"),
            oip(tensor(["0.6:1:dog", "0.4:0:cat"], [1, 2], "BYTES"), "2"),
            True,
            False,
        ),
        (oip(tensor(None, [1], "BYTES", 9), "1", b"\xff" * 9), oip(tensor(["a"], [1], "BYTES"), "2"), False, False),
        (oip(tensor(None, [1], "FP99", 4), "1", b"1234"), oip(tensor([1], [1], "FP99"), "2"), False, False),
    ],
)
def test_comparison_of_tensors(live, idle, classifier, agree):
    asked = compare.prediction("POST", "/v2/models/m/versions/1/infer")
    assert compare.compare(live, idle, asked, classifier=classifier, tolerance=1e-3).agree is agree


def test_numbers_that_are_none():
    nan, one = (oip(tensor(None, [1], size=4), "1", struct.pack("<f", value)) for value in (float("nan"), 1.0))
    asked = compare.prediction("POST", "/v2/models/m/infer")
    assert compare.compare(nan, nan, asked, classifier=False, tolerance=1e-3) == compare.Comparison(True, 0.0)
    assert compare.compare(nan, one, asked, classifier=False, tolerance=1e-3) == compare.Comparison(False, float("inf"))
