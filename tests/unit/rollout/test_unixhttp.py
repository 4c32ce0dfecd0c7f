"""Exchanges over HTTP: what is sent, what counts as an answer, and when one ends."""

from __future__ import annotations

import contextlib
import errno
import http.client
import socket
import threading
import time

import pytest
from rollout.unixhttp import MAX_ANSWER_BYTES, Connection, Disconnected, ExchangeError, UnixConnection, exchange
from rollout_stand_ins import serve

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


class Line(Connection):
    """A connection whose other end the test holds."""

    def __init__(self):
        super().__init__("box", None, 1)
        self.sock, self.other = socket.socketpair()

    def connect(self):
        raise ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused")


@pytest.fixture
def line():
    line = Line()
    yield line
    line.close()
    line.other.close()


def ask(line, answer, method="GET", end=True, timeout=1.0):
    line.other.sendall(answer)
    if end:
        line.other.shutdown(socket.SHUT_WR)
    return exchange(line, method, "/health", timeout=timeout)


@pytest.mark.parametrize(
    ("answer", "body", "closes"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", b"hi", False),
        (b"HTTP/1.1 200\r\nCONTENT-length:2  \r\nConnection: Close\r\n\r\nhi", b"hi", True),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nhi", b"hi", True),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\nConnection: keep-alive\r\n\r\nhi", b"hi", False),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", b"", False),
        (b"HTTP/1.1 200 OK\r\n\r\nall of it", b"all of it", True),
        (CHUNKED + b"3;a=b\r\none\r\nB\r\n, two three\r\n0\r\nX: y\r\n\r\n", b"one, two three", False),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi, there", b"hi", True),
    ],
)
def test_answers(line, answer, body, closes):
    found = ask(line, answer)
    assert (found.status, found.body, found.closes) == (200, body, closes)
    assert (line.sock is None) is closes


@pytest.mark.parametrize(("method", "status"), [("HEAD", 200), ("GET", 204), ("GET", 304)])
def test_some_answers_have_no_body(line, method, status):
    found = ask(line, f"HTTP/1.1 {status} X\r\nContent-Length: 9\r\n\r\n".encode(), method, end=False)
    assert (found.status, found.body, found.headers) == (status, b"", {"content-length": "9"})


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"", "the connection was closed before the answer"),
        (b"HTTP/1.1 200 OK\r\nContent-Le", "the connection was closed before the answer"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nhi", "the connection was closed within the answer"),
        (b"nonsense\r\n\r\n", "isn't HTTP: 'nonsense'"),
        (b"HTTP/2 200 OK\r\n\r\n", "isn't HTTP"),
        (b"HTTP/1.1 2x0 OK\r\n\r\n", "isn't HTTP"),
        (b"HTTP/1.1 099 OK\r\n\r\n", "isn't HTTP"),
        (b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n", "has the line 'no colon'"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n", "has the length '-1'"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: " + b"9" * 16 + b"\r\n\r\n", "has the length"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 4194305\r\n\r\n", f"longer than {MAX_ANSWER_BYTES} bytes"),
        (CHUNKED + b"400001\r\n", f"longer than {MAX_ANSWER_BYTES} bytes"),
        (CHUNKED + b"-1\r\n", "a piece of the length"),
        (CHUNKED + b"\r\n", "a piece of the length"),
        (CHUNKED + b"2\r\nhi!!", "longer than it says"),
        (b"HTTP/1.1 200 OK\r\nX: " + b"x" * 140_000, "a head of more than 65536 bytes"),
    ],
)
def test_what_is_no_answer(line, answer, words):
    with pytest.raises(ExchangeError) as fault:
        ask(line, answer)
    assert words in str(fault.value)
    # What is left of it can't become the next answer.
    assert line.sock is None


@pytest.mark.parametrize(
    ("answer", "gone"),
    [
        (b"", True),
        (b"HTTP/1.1 200 OK\r\nContent-Le", True),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nhi", False),
        (CHUNKED + b"5\r\nhi", False),
    ],
)
def test_whoever_breaks_off_an_answer_was_there(line, answer, gone):
    with pytest.raises(ExchangeError) as fault:
        ask(line, answer)
    assert isinstance(fault.value, Disconnected) == gone


def test_an_endless_answer_is_cut_off(line):
    def pour():
        with contextlib.suppress(OSError):
            line.other.sendall(b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * (MAX_ANSWER_BYTES + 1))

    thread = threading.Thread(target=pour)
    thread.start()
    with pytest.raises(ExchangeError, match="longer than"):
        exchange(line, "GET", "/", timeout=10)
    thread.join()


def test_an_answer_that_drips_ends_by_the_deadline(line):
    end = threading.Event()

    def drip():
        with contextlib.suppress(OSError):
            while not end.wait(0.05):
                line.other.sendall(b"H")

    thread = threading.Thread(target=drip)
    thread.start()
    started = time.monotonic()
    with pytest.raises(ExchangeError, match="no whole answer within 0.3 s"):
        exchange(line, "GET", "/", timeout=0.3)
    assert 0.25 < time.monotonic() - started < 2
    end.set()
    thread.join()


def test_what_is_sent(line):
    def sent(*request, **options):
        line.other.sendall(b"HTTP/1.1 204 X\r\n\r\n")
        exchange(line, *request, timeout=1, **options)
        return line.other.recv(65536)

    head = b"POST /predict HTTP/1.1\r\nhost: box\r\naccept-encoding: identity\r\ncontent-length: 2\r\n"
    assert sent("POST", "/predict", b"{}", {"X-Request-ID": "abc"}) == head + b"x-request-id: abc\r\n\r\n{}"
    assert sent("POST", "/predict").endswith(b"content-length: 0\r\n\r\n")
    assert (
        sent("GET", "/predict", headers={"Host": "other"})
        == b"GET /predict HTTP/1.1\r\nhost: other\r\naccept-encoding: identity\r\n\r\n"
    )


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/a b", {}),
        ("/a\r\nX: y", {}),
        ("/ä", {}),
        ("", {}),
        ("/", {"X": "a\r\nY: b"}),
        ("/", {"X": "a\nY: b"}),
        ("/", {"X: y\r\nZ": "a"}),
        ("/", {"X Y": "a"}),
        ("/", {"": "a"}),
        ("/", {"X": "\u20ac"}),
    ],
)
def test_what_cant_be_sent(line, path, headers):
    with pytest.raises(ValueError):
        exchange(line, "GET", path, headers=headers, timeout=1)
    line.other.setblocking(False)
    with pytest.raises(BlockingIOError):
        line.other.recv(1)


def test_a_closed_connection_is_opened_again_only_where_it_may_be(line):
    line.close()
    with pytest.raises(ExchangeError, match="Connection refused"):
        exchange(line, "GET", "/", timeout=1)
    line.auto_open = False
    with pytest.raises(ExchangeError, match="the connection was closed"):
        exchange(line, "GET", "/", timeout=1)


def test_only_a_socket_is_connected_to(tmp_path):
    with pytest.raises(ExchangeError, match="there is no socket"):
        exchange(UnixConnection(tmp_path / "none", 1), "GET", "/", timeout=1)
    (tmp_path / "link").symlink_to(tmp_path / "real.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "real.sock"))
        listener.listen()
        with pytest.raises(ExchangeError, match="isn't a socket"):
            exchange(UnixConnection(tmp_path / "link", 1), "GET", "/", timeout=1)


class _Echo:
    def answer(self, handler, body):
        handler.send(200, {"path": handler.path, "host": handler.headers["Host"], "body": body.decode()})


@pytest.mark.parametrize("kind", [Connection, http.client.HTTPConnection])
def test_tcp_with_one_connection_for_several_requests(kind):
    server = serve(("127.0.0.1", 0), _Echo())
    port = server.server_address[1]
    connection = kind("127.0.0.1", port, 5) if kind is Connection else kind("127.0.0.1", port, timeout=5)
    used = set()
    for _ in range(2):
        answer = exchange(connection, "POST", "/a?b=c", b"x" * 100_000, timeout=5)
        assert answer.status == 200 and f'"host": "127.0.0.1:{port}"' in answer.body.decode()
        used.add(connection.sock)
    assert len(used) == 1
    connection.close()
    server.shutdown()
    server.server_close()
