"""Bad requests through the front door: 4xx with JSON that says what was wrong, never a traceback, never a 500."""

import json
import socket

import pytest

JSON = {"Content-Type": "application/json"}

CASES = {
    "malformed JSON": ("POST", "/predict", b'{"data": [0.2, ', 400),
    "empty body": ("POST", "/predict", b"", 400),
    "no object": ("POST", "/predict", b"[1, 2]", 400),
    "no data": ("POST", "/predict", b'{"date": [0.2, 0.6]}', 400),
    "too few values": ("POST", "/predict", b'{"data": [0.2]}', 400),
    "too many values": ("POST", "/predict", b'{"data": [0.2, 0.6, 0.8]}', 400),
    "ragged rows": ("POST", "/predict", b'{"data": [[0.2, 0.6], [0.1]]}', 400),
    "too deep": ("POST", "/predict", b"[" * 100000, 400),
    "text": ("POST", "/predict", b'{"data": ["a", "b"]}', 400),
    "booleans": ("POST", "/predict", b'{"data": [true, false]}', 400),
    "null": ("POST", "/predict", b'{"data": null}', 400),
    "NaN": ("POST", "/predict", b'{"data": [NaN, 0.6]}', 400),
    "infinity": ("POST", "/predict", b'{"data": [1e999, 0.6]}', 400),
    "a number too large for float32": ("POST", "/predict", b'{"data": [1e39, 0.6]}', 400),
    "not UTF-8": ("POST", "/predict", b'{"data": "\xff\xfe"}', 400),
    "unknown path": ("GET", "/nothing/here", None, 404),
    "unknown test path": ("GET", "/test/nothing", None, 404),
    "metrics are for the inside": ("GET", "/metrics", None, 404),
    "test metrics too": ("GET", "/test/metrics", None, 404),
    "half a path": ("POST", "/test", b"{}", 404),
    "wrong method": ("GET", "/predict", None, 405),
    "odd method": ("DELETE", "/predict", None, 405),
    "too large": ("POST", "/predict", b" " * 9_000_000, 413),
    "too long an address": ("GET", "/" + "x" * 20000, None, 414),
}


@pytest.mark.parametrize("case", CASES)
def test_is_refused_with_a_reason(edge, case):
    method, path, body, status = CASES[case]
    answer = edge.request(method, path, body, JSON)
    assert answer.status == status, answer.text
    assert answer.headers["content-type"].startswith("application/json")
    assert set(answer.json) == {"error"}
    assert answer.json["error"]
    assert "Traceback" not in answer.text
    assert answer.headers["x-request-id"]


def test_wrong_method_names_the_right_one(edge):
    assert "POST" in edge.request("GET", "/predict").headers["allow"]


@pytest.mark.parametrize(
    "raw",
    [
        b"NONSENSE\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: a\r\nContent-Length: nine\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip\r\nConnection: close\r\n\r\n",
        b"GET /predict HTTP/2.0\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nX-Long: " + b"x" * 50000 + b"\r\n\r\n",
    ],
)
def test_broken_http_gets_json_too(edge, raw):
    with socket.create_connection(("127.0.0.1", edge.port), timeout=20) as connection:
        connection.sendall(raw)
        reply = b""
        while part := connection.recv(65536):
            reply += part
    head, _, body = reply.partition(b"\r\n\r\n")
    assert head.split()[1].startswith(b"4")
    assert json.loads(body)["error"]


@pytest.mark.parametrize("path", ["/%74est/predict", "/./test/predict", "//test/predict"])
def test_another_spelling_is_logged_with_the_side_that_answered(host, edge, engine, path):
    request_id = f"spelled-{path.encode().hex()}"
    answer = edge.predict(path, **{"X-Request-ID": request_id})
    assert answer.headers["x-model-colour"] == engine("status")["idle"]
    lines = host.file("/var/log/nginx/test_access.log").content_string.splitlines()
    entry = next(json.loads(line) for line in lines if request_id in line)
    assert (entry["environment"], entry["path"]) == ("test", path)


def test_an_error_of_nginx_is_logged_as_what_was_asked(host, edge):
    edge.request("POST", "/test/predict", b" " * 9_000_000, {"X-Request-ID": "too-large-for-test"})
    lines = host.file("/var/log/nginx/test_access.log").content_string.splitlines()
    entry = next(json.loads(line) for line in lines if "too-large-for-test" in line)
    assert (entry["environment"], entry["method"], entry["path"]) == ("test", "POST", "/test/predict")
    assert entry["status"] == 413
    assert "too-large-for-test" not in host.file("/var/log/nginx/prod_access.log").content_string


def test_a_path_that_is_no_text_keeps_the_log_readable(host, edge):
    with socket.create_connection(("127.0.0.1", edge.port), timeout=20) as connection:
        connection.sendall(b"GET /\xff\xfe HTTP/1.1\r\nHost: a\r\nX-Request-ID: no-text\r\nConnection: close\r\n\r\n")
        while connection.recv(65536):
            pass
    line = host.check_output("grep -a no-text /var/log/nginx/prod_access.log | iconv -f UTF-8 -t UTF-8")
    assert json.loads(line)["path"] == "-"


def test_the_service_still_works(edge):
    assert edge.predict().status == 200
