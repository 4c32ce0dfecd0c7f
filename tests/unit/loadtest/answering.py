"""A server that knows what it answered, and where Locust is."""

from __future__ import annotations

import http.server
import os
import shutil
import sys
import threading
import time
from pathlib import Path

LOADTEST = Path(__file__).resolve().parents[3] / "service/loadtest"
LOCUST = shutil.which("locust", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers as the server's `kinds` say, one after the other."""

    protocol_version = "HTTP/1.1"
    wbufsize = -1

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            kind = self.server.kinds[len(self.server.seen) % len(self.server.kinds)]
            self.server.seen.append((kind, self.client_address, self.path, body))
            self.server.headers.append(self.headers)
        if kind == "closed":
            self.close_connection = True
        elif kind == "garbage":
            self.wfile.write(b"SSH-2.0-server\r\n\r\n")
            self.close_connection = True
        elif kind == "slow":
            time.sleep(1.4)
            self.close_connection = True
        else:
            time.sleep(0.2 if kind == "late" else 0)
            self.answer(kind)

    def answer(self, kind):
        content = b"<html>" if kind == "html" else b'{"output": 1}'
        self.send_response({"error": 500, "redirect": 307}.get(kind, 200))
        self.send_header("X-Model-Colour", "blue" if kind == "blue" else "green")
        self.send_header("Content-Length", str(len(content)))
        if kind == "redirect":
            self.send_header("Location", "/elsewhere")
        self.end_headers()
        self.wfile.write(content[:5] if kind == "cut" else content)
        self.close_connection = kind == "cut"


class Server(http.server.ThreadingHTTPServer):
    """`kinds` says how it answers; `seen` has (kind, client, path, body) of each request, `headers` its headers."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, kinds):
        super().__init__(("127.0.0.1", 0), Handler)
        self.kinds, self.seen, self.headers, self.lock = kinds, [], [], threading.Lock()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def handle_error(self, *_):
        pass
