"""What clients do to a worker beyond asking nicely: over TCP, with the real processes."""

import gzip
import http.client
import json
import random
import signal
import socket
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from bundle_making import SHIPPED
from model_server import receiving
from service_process import SECONDS, Service, in_background, load, running, slow
from waitress.adjustments import Adjustments

BODY = b'{"data": [0.2, 0.6]}'
LIMIT = 100_000


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[Service, int]]:
    port = free_port()
    with (
        tempfile.TemporaryDirectory(prefix="ms-", dir="/tmp") as name,
        running(
            Path(name),
            SHIPPED / "1.0.0",
            MODEL_PORT=port,
            MODEL_MAX_BODY_BYTES=LIMIT,
            MODEL_CORS_ORIGINS="https://a.example",
        ) as service,
    ):
        service.wait_ready()
        yield service, port


def connect(port: int) -> socket.socket:
    client = socket.create_connection(("127.0.0.1", port), timeout=SECONDS)
    return client


def post(body: bytes, *headers: str, version: str = "1.1") -> bytes:
    lines = [f"POST /predict HTTP/{version}", "Host: x", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def read_answer(stream) -> tuple[int, dict[str, str], bytes]:
    status = int(stream.readline().split()[1])
    headers = {}
    while (line := stream.readline().strip()) != b"":
        name, _, value = line.decode("latin-1").partition(": ")
        headers[name.lower()] = value
    return status, headers, stream.read(int(headers["content-length"]))


def ask(port: int, body: bytes = BODY, **headers: str) -> tuple[int, dict[str, str], bytes]:
    with connect(port) as client:
        client.sendall(post(body, *(f"{name.replace('_', '-')}: {value}" for name, value in headers.items())))
        return read_answer(client.makefile("rb"))


def test_every_worker_answers_on_the_port(served):
    service, port = served
    status, headers, body = ask(port)
    assert status == 200 and list(json.loads(body)) == ["output"]
    assert headers["x-model-version"] == "1.0.0" and headers["date"].endswith(" GMT")
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    for path in ("/health", "/metrics"):
        connection.request("GET", path)
        response = connection.getresponse()
        assert response.status == 200 and response.read()
    connection.close()


def test_requests_sent_ahead_are_answered_in_order(served):
    _, port = served
    with connect(port) as client:
        # One is answered from the loop, one by Flask, one is an error: their order must stay.
        other = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
        client.sendall(post(BODY, "X-Request-ID: one") + other + post(b"{", "X-Request-ID: three") + post(BODY))
        stream = client.makefile("rb")
        answers = [read_answer(stream) for _ in range(4)]
    assert [status for status, _, _ in answers] == [200, 200, 400, 200]
    assert answers[0][1]["x-request-id"] == "one" and answers[2][1]["x-request-id"] == "three"
    assert b'"workers"' in answers[1][2]


def test_slashes_at_the_start_are_one(served):
    _, port = served
    with connect(port) as client:
        client.sendall(post(BODY).replace(b" /predict ", b" ///predict "))
        assert read_answer(client.makefile("rb"))[0] == 200


def test_http_1_0(served):
    _, port = served
    with connect(port) as client:
        client.sendall(post(BODY, version="1.0"))
        stream = client.makefile("rb")
        assert read_answer(stream)[1]["connection"] == "close"
        assert stream.read() == b""
    with connect(port) as client:
        stream = client.makefile("rb")
        for _ in range(2):
            client.sendall(post(BODY, "Connection: Keep-Alive", version="1.0"))
            assert read_answer(stream)[1]["connection"] == "Keep-Alive"


def test_a_request_in_single_bytes_and_in_chunks(served):
    _, port = served
    with connect(port) as client:
        for byte in post(BODY):
            client.sendall(bytes([byte]))
        assert read_answer(client.makefile("rb"))[0] == 200
        client.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        for start in range(0, len(BODY), 7):
            part = BODY[start : start + 7]
            client.sendall(f"{len(part):x}\r\n".encode() + part + b"\r\n")
        client.sendall(b"0\r\n\r\n")
        assert read_answer(client.makefile("rb"))[0] == 200


def test_expect_continue(served):
    _, port = served
    with connect(port) as client:
        head = post(BODY, "Expect: 100-continue")[: -len(BODY)]
        client.sendall(head)
        stream = client.makefile("rb")
        assert stream.readline().split()[1] == b"100"
        assert stream.readline().strip() == b""
        client.sendall(BODY)
        assert read_answer(stream)[0] == 200


@pytest.mark.parametrize(
    ("encoding", "body", "status"),
    [
        ("gzip", gzip.compress(BODY, mtime=0), 200),
        ("GZIP", gzip.compress(BODY, mtime=0), 200),
        ("deflate", zlib.compress(BODY), 200),
        ("identity", BODY, 200),
        ("gzip", BODY, 400),
        ("gzip", gzip.compress(BODY, mtime=0)[:-9], 400),
        ("gzip", gzip.compress(BODY, mtime=0) + b"more", 400),
        ("gzip", gzip.compress(b" " * (LIMIT + 1), mtime=0), 413),
        ("gzip", gzip.compress(b" " * 50_000_000, mtime=0), 413),
        ("br", BODY, 415),
        ("gzip, gzip", gzip.compress(gzip.compress(BODY, mtime=0), mtime=0), 415),
    ],
)
def test_compressed_bodies(served, encoding, body, status):
    found, _, answer = ask(served[1], body, Content_Encoding=encoding)
    assert found == status
    assert list(json.loads(answer)) == ["output" if status == 200 else "error"]


def test_pages_of_listed_origins_may_read_the_answers(served):
    _, port = served
    allowed = ask(port, Origin="https://a.example")[1]
    assert allowed["access-control-allow-origin"] == "https://a.example" and allowed["vary"] == "Origin"
    assert "access-control-allow-origin" not in ask(port, Origin="https://b.example")[1]
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    for origin, methods in (("https://a.example", "GET, POST, PUT, OPTIONS"), ("https://b.example", None)):
        connection.request(
            "OPTIONS",
            "/predict",
            headers={
                "Origin": origin,
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "content-type",
            },
        )
        response = connection.getresponse()
        response.read()
        assert (response.status, response.headers["Access-Control-Allow-Methods"]) == (204, methods)
    connection.close()


@pytest.mark.parametrize("seconds", ["0", "-1", "soon", "nan", "inf", "1e9"])
def test_a_client_says_how_long_it_waits(served, seconds):
    assert ask(served[1], X_Request_Timeout="0.5")[0] == 200
    status, _, answer = ask(served[1], X_Request_Timeout=seconds)
    assert status == 400 and "X-Request-Timeout" in json.loads(answer)["error"]


def test_noise_gets_an_error_or_nothing_and_the_worker_lives(served):
    service, port = served
    source = random.Random(1)
    for _ in range(150):
        with connect(port) as client:
            noise = bytearray(post(BODY, "Content-Type: application/json"))
            for _ in range(source.randint(1, 8)):
                noise[source.randrange(len(noise))] = source.randrange(256)
            client.sendall(noise)
            client.shutdown(socket.SHUT_WR)
            answer = b""
            try:
                while part := client.recv(65536):
                    answer += part
            except ConnectionResetError:
                continue
        assert not answer or answer.split()[1] in (b"200", b"400", b"404", b"405", b"413", b"415", b"501"), noise
        assert b"Traceback" not in answer
    assert service.health()[1]["workers"]["restarts"] == 0
    assert ask(port)[0] == 200


def test_a_slow_upload_holds_up_nobody(served):
    _, port = served
    with connect(port) as sleepy:
        sleepy.sendall(post(BODY)[:-5])
        started = time.monotonic()
        for _ in range(20):
            assert ask(port)[0] == 200
        assert time.monotonic() - started < SECONDS / 2
        sleepy.sendall(BODY[-5:])
        assert read_answer(sleepy.makefile("rb"))[0] == 200


def test_bodies_that_would_fill_the_memory_are_refused(short_dir):
    port, size = free_port(), 8_000_000
    # Spaces around it don't make the JSON another.
    large = BODY + b" " * (size - len(BODY))
    announced = post(large)[:-size]
    with running(short_dir, SHIPPED / "1.0.0", MODEL_WORKERS=1, MODEL_PORT=port) as service:
        service.wait_ready()
        holders = [connect(port) for _ in range(20)]
        for holder in holders:
            holder.sendall(announced + large[:100])
        # What is announced takes no room yet.
        assert ask(port, large)[0] == 200
        for holder in holders[8:]:
            holder.close()
        for holder in holders[:8]:
            holder.sendall(large[100:-100])
        # Each takes a turn of the loop or more, in which the server reads on.
        for _ in range(200):
            ask(port)
        service.wait_for(lambda: ask(port, large)[0] == 503, "without room")
        status, headers, body = ask(port, large)
        assert (status, headers["retry-after"]) == (503, "1") and "try again" in json.loads(body)["error"]
        rejected = 'model_rejected_total{model="simplemodel",reason="queue_full"}'
        service.wait_for(lambda: service.metrics()[rejected] >= 2, "counted")
        # Also for what Flask answers, without a length in advance, and on the same connection afterwards.
        with connect(port) as client:
            client.sendall(post(large).replace(b" /predict ", b" /nowhere "))
            status, headers, body = read_answer(client.makefile("rb"))
            assert (status, headers["retry-after"]) == (503, "1") and "error" in json.loads(body)
        with connect(port) as client:
            chunked = b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
            client.sendall(chunked + f"{size:x}\r\n".encode() + large + b"\r\n0\r\n\r\n")
            assert read_answer(client.makefile("rb"))[0] == 503
        with connect(port) as client:
            stream = client.makefile("rb")
            client.sendall(post(large))
            assert read_answer(stream)[0] == 503
            client.sendall(post(BODY))
            assert read_answer(stream)[0] == 200
        # Those who came first lose nothing, and whoever leaves makes room.
        holders[0].sendall(large[-100:])
        assert read_answer(holders[0].makefile("rb"))[0] == 200
        holders[1].close()
        service.wait_for(lambda: ask(port, large)[0] == 200, "with room again")
        for holder in holders[2:8]:
            holder.sendall(large[-100:])
            assert read_answer(holder.makefile("rb"))[0] == 200
        for _ in range(20):
            assert ask(port, large)[0] == 200


def test_room_is_taken_as_bodies_grow():
    room = receiving.Room(100)
    adjustments = Adjustments(max_request_body_size=1000)

    def begun(announced: int) -> receiving.Parser:
        parser = receiving.Parser(room, adjustments)
        parser.received(f"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: {announced}\r\n\r\n".encode())
        return parser

    alone = begun(500)
    for _ in range(4):
        alone.received(b"x" * 100)
    small = begun(10)
    small.received(b"x" * 10)
    assert isinstance(small.error, receiving.Overloaded)
    # Of any size, and however many look on.
    alone.received(b"x" * 100)
    assert alone.completed and alone.error is None and len(alone.body()) == 500
    alone.close()
    one, other = begun(60), begun(60)
    for parser in (one, other):
        parser.received(b"x" * 50)
    other.received(b"x" * 5)
    assert room.taken == 50
    # The one that was refused has made room for the other, and is read to its end.
    one.received(b"x" * 10)
    other.received(b"x" * 5)
    assert one.completed and one.error is None
    assert other.completed and isinstance(other.error, receiving.Overloaded)
    for parser in (one, other, small):
        parser.close()
    assert room.taken == 0


def test_one_request_of_the_queue_gives_up_another_is_too_late(short_dir, bundle_dir):
    slow(bundle_dir, 1.5)
    port = free_port()
    with running(short_dir, bundle_dir, MODEL_WORKERS=1, MODEL_PORT=port) as service:
        service.wait_ready()
        results, threads = in_background(1, lambda: ask(port, b'{"data": [9, 0]}'))
        service.wait_for(lambda: load(service) == (1, 0), "with the model")
        leaver = connect(port)
        leaver.sendall(post(BODY))
        late, late_threads = in_background(1, lambda: ask(port, X_Request_Timeout="0.1"))
        service.wait_for(lambda: load(service) == (3, 2), "queued")
        leaver.close()
        for thread in threads + late_threads:
            thread.join(SECONDS)
        assert results[0][0] == 200
        assert late[0][0] == 504 and "error" in json.loads(late[0][2])

        def rejected(reason: str) -> float:
            return service.metrics()[f'model_rejected_total{{model="simplemodel",reason="{reason}"}}']

        service.wait_for(lambda: (rejected("abandoned"), rejected("deadline")) == (1, 1), "counted")


def test_sigterm_finishes_what_came_over_the_port(short_dir, bundle_dir):
    slow(bundle_dir, 0.5)
    port = free_port()
    (short_dir / "jobs").mkdir()
    settings = {"MODEL_WORKERS": 2, "MODEL_PORT": port, "MODEL_JOBS_DIR": short_dir / "jobs"}
    with running(short_dir, bundle_dir, **settings) as service:
        service.wait_ready()
        results, threads = in_background(6, lambda: ask(port, b'{"data": [9, 0]}'))
        service.wait_for(lambda: load(service)[0] == 6, "in progress")
        service.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(SECONDS)
        assert [result[0] for result in results] == [200] * 6
        assert service.process.wait(SECONDS) == 0
        with pytest.raises(ConnectionRefusedError):
            connect(port)


def test_a_port_that_is_taken_is_said(short_dir):
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        with running(short_dir, SHIPPED / "1.0.0", MODEL_PORT=port) as service:
            assert service.process.wait(SECONDS) == 78
            assert any(f"127.0.0.1:{port}: Address already in use" in line["message"] for line in service.logs())


def test_many_clients_get_their_own_answers(served):
    _, port = served
    expected = {}
    with connect(port) as client:
        stream = client.makefile("rb")
        for number in range(40):
            client.sendall(post(json.dumps({"data": [number / 40, 0.5]}).encode()))
            expected[number] = json.loads(read_answer(stream)[2])["output"]
    assert len(set(expected.values())) == 40
    wrong = []

    def client_loop(seed: int) -> None:
        source = random.Random(seed)
        with connect(port) as client:
            stream = client.makefile("rb")
            for _ in range(100):
                number = source.randrange(40)
                client.sendall(post(json.dumps({"data": [number / 40, 0.5]}).encode()))
                found = json.loads(read_answer(stream)[2])["output"]
                if abs(found - expected[number]) > 1e-5:
                    wrong.append((number, found))

    threads = [threading.Thread(target=client_loop, args=(seed,)) for seed in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS)
    assert wrong == []
