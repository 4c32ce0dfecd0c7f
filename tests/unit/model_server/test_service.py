"""The real processes: started, asked, killed and stopped."""

import json
import os
import re
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from bundle_making import ROOT, SHIPPED, write_sums
from service_process import SECONDS, Connection, Service, in_background, load, running, slow

SIMPLEMODEL = 'model="simplemodel",version="1.0.0"'
NOT_FINITE = "the model has no finite answer for these numbers"


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with (
        tempfile.TemporaryDirectory(prefix="ms-", dir="/tmp") as name,
        running(Path(name), SHIPPED / "1.0.0", MODEL_MAX_BODY_BYTES=10_000) as started,
    ):
        started.wait_ready()
        yield started


def test_prediction(service):
    expected = json.loads((SHIPPED / "1.0.0" / "examples.json").read_text())["examples"][0]["response"]["output"]
    for worker in (0, 1):
        status, headers, body = service.predict([0.2, 0.6], worker)
        assert (status, headers["Content-Type"]) == (200, "application/json")
        assert json.loads(body) == {"output": pytest.approx(expected, abs=1e-4)}
        assert (headers["X-Model-Colour"], headers["X-Model-Version"]) == ("green", "1.0.0")
        assert "Server" not in headers
    assert len(json.loads(service.predict([[0.2, 0.6]] * 64)[2])["output"]) == 64


def test_health(service):
    status, document = service.health()
    digest = document.pop("bundle_digest")
    assert status == 200 and re.fullmatch(r"sha256:[0-9a-f]{64}", digest)
    assert document.pop("workers").keys() == {"wanted", "ready", "restarts"}
    assert document == {
        "status": "ready",
        "reason": None,
        "colour": "green",
        "release": "7",
        "model": "simplemodel",
        "version": "1.0.0",
    }


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/predict", b"{", 400),
        ("POST", "/predict", b"", 400),
        ("POST", "/predict", None, 400),
        ("POST", "/predict", b'{"data": [[1, 2], [NaN, 1]]}', 400),
        ("POST", "/predict", json.dumps({"data": [[1, 2]] * 65}).encode(), 400),
        ("POST", "/predict", b"x" * 10_001, 413),
        ("POST", "/predict", b"x" * 20_001, 413),
        ("POST", "/predict/", b"{}", 404),
        ("POST", "/x//predict", b"{}", 404),
        ("POST", "/static/x", b"{}", 404),
        ("GET", "/nowhere", None, 404),
        ("GET", "/predict", None, 405),
        ("OPTIONS", "/predict", None, 405),
        ("BREW", "/predict", None, 405),
        ("DELETE", "/elsewhere", None, 404),
    ],
)
def test_errors_are_json(service, method, path, body, status):
    found, headers, answer = service.ask("worker-0", method, path, body)
    assert (found, headers["Content-Type"]) == (status, "application/json")
    assert json.loads(answer).keys() == {"error"}
    assert headers["X-Request-ID"] and headers["X-Model-Version"] == "1.0.0"
    assert headers["Allow"] == ("POST" if status == 405 else None)
    assert str(ROOT) not in answer.decode() and "Traceback" not in answer.decode()


def test_unparsable_http_is_answered_in_json_too(service):
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(SECONDS)
        client.connect(str(service.directory / "worker-0.sock"))
        client.sendall(b"POST /predict HTTP/1.1\r\nContent-Length: many\r\nX-Request-ID: mine\r\n\r\n")
        answer = b""
        while part := client.recv(65536):
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400") and b"X-Request-Id: mine" in head and b"X-Model-Colour: green" in head
    assert json.loads(body).keys() == {"error"}


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "nonsense", "multipart/form-data"])
def test_any_content_type_is_fine(service, kind):
    assert service.predict([0.2, 0.6], Content_Type=kind)[0] == 200


def test_odd_host_header_is_no_failure(service):
    assert service.predict([0.2, 0.6], Host="a b/<>")[0] in (200, 400)


def test_request_ids(service):
    for good in ("a", "A-b_c.9", "x" * 64):
        assert service.predict([0.2, 0.6], X_Request_ID=good)[1]["X-Request-ID"] == good
    for bad in ("", "x" * 65, "a b", "a;b", "\u00e9"):
        given = service.predict([0.2, 0.6], X_Request_ID=bad)[1]["X-Request-ID"]
        assert given != bad and re.fullmatch("[0-9a-f]{32}", given)


def test_log_lines(service):
    service.predict([0.123456, 0.6], X_Request_ID="logged-once")
    service.wait_for(lambda: "logged-once" in service.log_file.read_text(), "logged")
    assert "0.123456" not in service.log_file.read_text()
    (line,) = [line for line in service.logs() if line.get("request_id") == "logged-once"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line.pop("time"))
    assert line.pop("duration_ms") >= line.pop("model_ms") > 0
    assert line.pop("queue_ms") >= 0
    assert line == {
        "level": "info",
        "event": "request",
        "message": "POST /predict 200",
        "colour": "green",
        "release": "7",
        "model": "simplemodel",
        "version": "1.0.0",
        "request_id": "logged-once",
        "method": "POST",
        "path": "/predict",
        "status": 200,
        "rows": 1,
    }


def test_metrics(service):
    before = service.metrics()
    service.predict([[0.2, 0.6]] * 3)
    service.ask("worker-0", "GET", "/made/up")
    after = service.metrics()

    def rise(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert rise('predictions_total{model="simplemodel",status="ok"}') == 3
    assert rise('prediction_duration_seconds_count{model="simplemodel"}') == 1
    assert rise('http_requests_total{code="200",method="POST",path="/predict"}') == 1
    assert rise('http_requests_total{code="404",method="GET",path="other"}') == 1
    assert after["acc_simplemodel"] > 0.8
    assert after['http_requests_total{code="503",method="POST",path="/predict"}'] == 0
    assert not [name for name in after if "pid=" in name or "_created" in name or "/made/up" in name]
    buckets = re.findall(r'prediction_duration_seconds_bucket\{le="([^"]+)",model="simplemodel"', "\n".join(after))
    bounds = [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5]
    assert buckets == [*map(str, bounds), "+Inf"]


def outcomes(service: Service, model: str) -> dict[str, float]:
    prefix = f'predictions_total{{model="{model}",status="'
    return {name[len(prefix) : -2]: value for name, value in service.metrics().items() if name.startswith(prefix)}


def test_rows_count_by_what_became_of_them(short_dir, bundle_dir):
    slow(bundle_dir, 4)
    with running(short_dir, bundle_dir, MODEL_WORKERS=1, MODEL_MAX_BODY_BYTES=10_000) as service:
        service.wait_ready()
        assert outcomes(service, "simplemodel") == {"ok": 0, "error": 0, "invalid_input": 0, "timeout": 0}
        assert time.time() - 600 < service.metrics()[f"model_loaded_timestamp_seconds{{{SIMPLEMODEL}}}"] < time.time()
        results, threads = in_background(1, lambda: service.predict([9, 0]))
        service.wait_for(lambda: load(service) == (1, 0), "at work")
        assert service.predict([[1, 1]] * 3, X_Request_Timeout="0.1")[0] == 504
        # Nobody can tell how many rows they have.
        for body in (b"{", b"x" * 10_001, json.dumps({"data": [[1, 2], [1, "x"]]}).encode()):
            assert service.ask("worker-0", "POST", "/predict", body)[0] in (400, 413)
        assert service.ask("worker-0", "POST", "/v1/models/other:predict", b'{"instances": [[1, 2]]}')[0] == 404
        threads[0].join(SECONDS)
        assert results[0][0] == 200
        assert outcomes(service, "simplemodel") == {"ok": 1, "error": 0, "invalid_input": 3, "timeout": 3}


def test_rows_that_turn_out_invalid_count_one_by_one(short_dir):
    image = json.loads((ROOT / "bundles/digits/1.0.0/examples.json").read_text())["examples"][0]["request"]["data"]
    with running(short_dir, ROOT / "bundles/digits/1.0.0", MODEL_WORKERS=1) as service:
        service.wait_ready()
        # It is base64, and no image.
        assert service.predict([image, image, "AAAA"])[0] == 400
        assert service.predict([image, image])[0] == 200
        # Answers are counted just after they are sent.
        service.wait_for(lambda: outcomes(service, "digits")["ok"] == 2, "counting")
        assert outcomes(service, "digits") == {"ok": 2, "error": 0, "invalid_input": 3, "timeout": 0}


def test_sockets_are_for_owner_and_group(service):
    for name in ("control", "worker-0", "worker-1"):
        assert (service.directory / f"{name}.sock").stat().st_mode & 0o777 == 0o660


def test_killed_processes_come_back_and_counters_stay(short_dir):
    with running(short_dir, SHIPPED / "1.0.0") as service:
        service.wait_ready()
        for _ in range(5):
            for worker in (0, 1):
                service.predict([0.2, 0.6], worker)
        ok = 'predictions_total{model="simplemodel",status="ok"}'
        # Answers are counted just after they are sent.
        service.wait_for(lambda: service.metrics()[ok] == 10, "counting")
        files = sorted(short_dir.glob("model-metrics-*/*"))
        for killed in (1, 2, 3):
            # Children come oldest first, and the control process is older than any worker.
            os.kill(service.children()[1], signal.SIGKILL)
            # A request sent meanwhile waits in the socket's backlog for the replacement.
            for worker in (0, 1):
                assert service.predict([0.2, 0.6], worker)[0] == 200
            expected = {"wanted": 2, "ready": 2, "restarts": killed}
            service.wait_for(lambda wanted=expected: service.health()[1]["workers"] == wanted, "replaced")
            service.wait_for(lambda total=10 + 2 * killed: service.metrics()[ok] == total, "counting on")
            found = service.metrics()
            assert found['prediction_duration_seconds_count{model="simplemodel"}'] == 10 + 2 * killed
            assert found["model_worker_restarts_total"] == killed
            assert found['model_requests_in_progress{model="simplemodel"}'] == 0
            assert not [name for name in found if "pid=" in name]
        assert sorted(short_dir.glob("model-metrics-*/*")) == files

        os.kill(service.children()[0], signal.SIGKILL)
        service.wait_for(lambda: service.health()[1]["status"] == "ready", "answering again")
        assert service.metrics()[ok] == 16


def test_sigterm_finishes_what_was_accepted(short_dir, bundle_dir):
    slow(bundle_dir, 0.3)
    with running(short_dir, bundle_dir, MODEL_WORKERS=1) as service:
        service.wait_ready()
        results, threads = in_background(5, lambda: service.predict([9, 0]))
        service.wait_for(lambda: load(service)[0] == 5, "in progress")
        service.process.send_signal(signal.SIGTERM)
        service.wait_for(lambda: not (short_dir / "worker-0.sock").exists(), "closed")
        status, document = service.health()
        assert (status, document["status"]) == (503, "draining")
        for thread in threads:
            thread.join(SECONDS)
        assert [result[0] for result in results] == [200] * 5
        assert all(headers["Connection"] == "close" for _, headers, _ in results)
        assert service.process.wait(SECONDS) == 0
        assert sorted(path.name for path in short_dir.iterdir()) == ["log"]


def test_sigterm_sends_the_whole_of_a_large_answer(short_dir, bundle_dir):
    slow(bundle_dir, 0, width=20_000)
    with running(short_dir, bundle_dir, MODEL_WORKERS=1) as service:
        service.wait_ready()
        connection = Connection(short_dir / "worker-0.sock")
        connection.request("POST", "/predict", json.dumps({"data": [[0.2, 0.6]] * 64}))
        response = connection.getresponse()
        service.process.send_signal(signal.SIGTERM)
        service.wait_for(lambda: not (short_dir / "worker-0.sock").exists(), "closed")
        # Longer than the drain lets idle connections live.
        time.sleep(0.5)
        body = response.read()
        assert len(body) > 20_000_000 and len(json.loads(body)["output"]) == 64
        assert service.process.wait(SECONDS) == 0


def test_sigterm_answers_connections_that_nobody_has_accepted_yet(short_dir):
    with running(short_dir, SHIPPED / "1.0.0", MODEL_WORKERS=1) as service:
        service.wait_ready()
        worker = service.children()[1]
        os.kill(worker, signal.SIGSTOP)
        # On a Unix socket both end without anybody having accepted.
        connections = [Connection(short_dir / "worker-0.sock") for _ in range(3)]
        for connection in connections:
            connection.request("POST", "/predict", b'{"data": [0.2, 0.6]}')
        service.process.send_signal(signal.SIGTERM)
        service.wait_for(lambda: not (short_dir / "worker-0.sock").exists(), "closed")
        os.kill(worker, signal.SIGCONT)
        assert [connection.getresponse().status for connection in connections] == [200] * 3
        assert service.process.wait(SECONDS) == 0


def test_drain_ends_at_its_deadline(short_dir, bundle_dir):
    slow(bundle_dir, 60)
    with running(short_dir, bundle_dir, MODEL_WORKERS=1, MODEL_DRAIN_SECONDS=1) as service:
        service.wait_ready()
        results, threads = in_background(1, lambda: service.predict([9, 0]))
        service.wait_for(lambda: load(service)[0] == 1, "in progress")
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(10) == 0
        threads[0].join(SECONDS)
        assert isinstance(results[0], Exception)


def test_full_queue_is_refused_at_once_while_health_answers(short_dir, bundle_dir):
    slow(bundle_dir, 1.5)
    with running(short_dir, bundle_dir, MODEL_WORKERS=1, MODEL_QUEUE_LIMIT=2) as service:
        service.wait_ready()
        # The first must be with the model before the others fill the queue.
        results, threads = in_background(1, lambda: service.predict([9, 0]))
        service.wait_for(lambda: load(service) == (1, 0), "with the model")
        more_results, more_threads = in_background(2, lambda: service.predict([9, 0]))
        service.wait_for(lambda: load(service) == (3, 2), "queued")
        started = time.monotonic()
        status, headers, body = service.predict([0.2, 0.6])
        assert (status, headers["Retry-After"]) == (503, "1") and json.loads(body).keys() == {"error"}
        assert service.health()[0] == 200
        assert time.monotonic() - started < 1
        for thread in (*threads, *more_threads):
            thread.join(SECONDS)
        assert [result[0] for result in results + more_results] == [200] * 3


@pytest.mark.parametrize("quotes", [False, True])
def test_model_that_fails_on_a_request(short_dir, bundle_dir, quotes):
    source = (bundle_dir / "model.py").read_text()
    broken = "if rows[0, 0] == 9:\n            raise RuntimeError('secret place')\n"
    broken += "        return self.layers(rows) * (float('nan') if rows[0, 0] == 8 else 1)"
    (bundle_dir / "model.py").write_text(source.replace("return self.layers(rows)", broken))
    write_sums(bundle_dir)
    with running(short_dir, bundle_dir, MODEL_WORKERS=1, MODEL_LOG_ERROR_MESSAGES=int(quotes)) as service:
        service.wait_ready()
        messages = {9: (500, "the model failed on this request"), 8: (400, NOT_FINITE)}
        for number, (code, message) in messages.items():
            status, _, body = service.predict([[number, 0], [0, 0]])
            assert (status, json.loads(body)) == (code, {"error": message})
        assert service.predict([0.2, 0.6])[0] == 200
        assert service.metrics()['predictions_total{model="simplemodel",status="error"}'] == 4
        failure, without_answer = [line for line in service.logs() if line["event"] == "prediction_failed"]
        assert without_answer["message"] == NOT_FINITE and without_answer["request_id"]
        assert failure["message"] == f"the model failed: RuntimeError{': secret place' if quotes else ''}"
        assert "/model.py" in failure["traceback"] and ", in forward\n" in failure["traceback"]
        # Neither the words of the exception nor the line that has them.
        assert [("secret" in json.dumps(line)) for line in service.logs() if "traceback" in line] == [quotes]


def test_hung_worker_is_killed_and_replaced(short_dir, bundle_dir):
    slow(bundle_dir, 3600)
    with running(short_dir, bundle_dir, MODEL_HANG_SECONDS=1) as service:
        service.wait_ready()
        results, threads = in_background(1, lambda: service.predict([9, 0]))
        expected = {"wanted": 2, "ready": 2, "restarts": 1}
        service.wait_for(lambda: service.health()[1]["workers"] == expected, "replaced")
        threads[0].join(SECONDS)
        assert isinstance(results[0], Exception)
        assert [service.predict([0.2, 0.6], worker)[0] for worker in (0, 1)] == [200, 200]
        (line,) = [line for line in service.logs() if line["event"] == "worker_hung"]
        assert line["role"] == "worker-0"


def test_socket_is_hidden_while_its_worker_is_held_back(short_dir):
    with running(short_dir, SHIPPED / "1.0.0") as service:
        service.wait_ready()
        path = short_dir / "worker-0.sock"
        # Children come oldest first: after the control process worker 0, and its replacements at the end.
        _, worker, other = service.children()
        for restarts in (1, 2, 3):
            os.kill(worker, signal.SIGKILL)
            service.wait_for(lambda wanted=restarts: service.health()[1]["workers"]["restarts"] == wanted, "replaced")
            service.wait_ready()
            worker = service.children()[2]
            assert service.children()[1] == other
        os.kill(worker, signal.SIGKILL)
        service.wait_for(lambda: not path.exists(), "hidden")
        assert (short_dir / ".worker-0.sock").exists()
        with pytest.raises(FileNotFoundError):
            service.predict([0.2, 0.6])
        assert service.predict([0.2, 0.6], 1)[0] == 200
        service.wait_for(path.exists, "shown")
        assert service.predict([0.2, 0.6])[0] == 200
        assert not (short_dir / ".worker-0.sock").exists()


def test_control_socket_logs_errors_only(service):
    service.health()
    service.metrics()
    service.ask("control", "GET", "/" + "x" * 5000, X_Request_ID="not-found-on-control")
    service.wait_for(lambda: "not-found-on-control" in service.log_file.read_text(), "logged")
    assert not [line for line in service.logs() if line.get("path") in ("/health", "/metrics") and line["status"] < 400]
    (line,) = [line for line in service.logs() if line.get("request_id") == "not-found-on-control"]
    assert line["status"] == 404 and len(line["path"]) == 200 and len(json.dumps(line)) < 1000


def test_health_says_starting_while_the_model_loads(short_dir, bundle_dir):
    source = (bundle_dir / "model.py").read_text()
    (bundle_dir / "model.py").write_text(source + "\nimport time\ntime.sleep(3)\n")
    write_sums(bundle_dir)
    with running(short_dir, bundle_dir) as service:
        service.wait_for(lambda: service.health() is not None, "answering")
        status, document = service.health()
        assert (status, document["status"], document["workers"]["ready"]) == (503, "starting", 0)
        assert not list(short_dir.glob("worker-*.sock"))
        # Loading must not make the container deaf.
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(SECONDS) == 0
        assert not list(short_dir.glob("*.sock"))


def test_rejected_bundle(short_dir, bundle_dir):
    (bundle_dir / "weights.pth").write_bytes(b"other")
    (short_dir / "worker-5.sock").touch()
    with running(short_dir, bundle_dir) as service:
        assert service.process.wait(SECONDS) == 78
        (line,) = service.logs()
        assert (line["event"], line["level"]) == ("bundle_rejected", "error")
        assert line["message"].startswith("bundle simplemodel 1.0.0: weights.pth doesn't match its checksum")
        assert json.loads((short_dir / "startup_error.json").read_text()) == {"reason": line["message"]}
        assert not list(short_dir.glob("*.sock"))


def test_bundle_rejected_after_loading(short_dir, bundle_dir):
    document = json.loads((bundle_dir / "examples.json").read_text())
    document["examples"][0]["response"]["output"] = 0.1
    (bundle_dir / "examples.json").write_text(json.dumps(document))
    write_sums(bundle_dir)
    with running(short_dir, bundle_dir) as service:
        assert service.process.wait(SECONDS) == 78
        assert [line["event"] for line in service.logs()] == ["bundle_rejected"]
        assert sorted(path.name for path in short_dir.iterdir()) == ["log", "startup_error.json"]


def test_a_start_removes_the_error_of_the_one_before(short_dir):
    (short_dir / "startup_error.json").write_text("{}")
    for leftover in ("worker-0.sock", ".worker-0.sock", ".worker-9.sock"):
        (short_dir / leftover).touch()
    with running(short_dir, SHIPPED / "1.1.0") as service:
        service.wait_ready()
        assert not list(short_dir.glob(".worker-*.sock"))
        assert not (short_dir / "startup_error.json").exists()


@pytest.mark.parametrize(
    ("setting", "value"), [("MODEL_WORKERS", "many"), ("MODEL_SOCKET_DIR", "/nowhere")], ids=["number", "directory"]
)
def test_wrong_setting(short_dir, setting, value):
    with running(short_dir, SHIPPED / "1.0.0", **{setting: value}) as service:
        assert service.process.wait(SECONDS) == 78
        last = service.logs()[-1]
        assert last["event"] == "configuration_rejected" and setting in last["message"]


def test_memory_of_two_workers(short_dir):
    with running(short_dir, SHIPPED / "1.0.0", MALLOC_ARENA_MAX=1) as service:
        service.wait_ready()
        for worker in (0, 1):
            for _ in range(50):
                service.predict([0.2, 0.6], worker)
        total = 0
        for pid in (service.process.pid, *service.children()):
            text = Path(f"/proc/{pid}/smaps_rollup").read_text()
            total += int(re.search(r"^Pss:\s+(\d+) kB", text, re.MULTILINE)[1])
        assert total / 1024 < 260
