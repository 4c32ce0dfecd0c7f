"""Clients as users are: what they count, and what ends their waiting."""

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from user_traffic import CLIENTS, UserTraffic


class Colour(BaseHTTPRequestHandler):
    """Answers as blue; once in a while with 500, and once in a while not at all."""

    protocol_version = "HTTP/1.1"
    requests: list = []
    connections: set = set()
    one_at_a_time = threading.Lock()

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        with self.one_at_a_time:
            self.connections.add(self.client_address)
            self.requests.append(self.headers["X-User-Id"])
            number = len(self.requests)
        if number % 40 == 0:
            self.close_connection = True
            return
        self.send_response(500 if number % 10 == 0 else 200)
        self.send_header("X-Model-Colour", "blue")
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    Colour.requests, Colour.connections = [], set()
    with ThreadingHTTPServer(("127.0.0.1", 0), Colour) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def test_each_request_is_counted_by_what_came_of_it(server):
    with UserTraffic(f"http://127.0.0.1:{server.server_port}") as traffic:
        traffic.more(100)
    counts, requests = traffic.counts(), len(Colour.requests)
    assert counts.total() == len(traffic.answers) == requests >= 100
    assert counts[0, ""] == requests // 40 and counts[500, "blue"] == requests // 10 - requests // 40
    assert traffic.failed() == requests // 10
    # Each client keeps its connection, and another user speaks each time.
    assert len(Colour.connections) <= CLIENTS + counts[0, ""]
    assert len(set(Colour.requests)) > CLIENTS


def test_what_nobody_answers_is_told(server):
    traffic = UserTraffic(f"http://127.0.0.1:{server.server_port}")
    with pytest.raises(TimeoutError, match="of 5 requests 5 weren't made within 0.1 s"):
        traffic.more(5, 0.1)


def test_nobody_waits_for_clients_that_were_stopped(server):
    began = time.monotonic()
    with UserTraffic(f"http://127.0.0.1:{server.server_port}") as traffic:
        traffic.more(10)
    with pytest.raises(TimeoutError):
        traffic.more(5)
    assert time.monotonic() - began < 30
