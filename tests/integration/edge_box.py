"""The edge in a directory of its own: nginx with the role's configuration, and stand-ins for what is behind it."""

from __future__ import annotations

import http.client
import json
import os
import pwd
import shutil
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from rollout.routing import Routing, State
from rollout.unixhttp import Answer, exchange

from benchmarks.processes import Process
from benchmarks.servers import free_port
from lab.programs import search_path

PROJECT = Path(__file__).resolve().parents[2]
ROLE = PROJECT / "roles" / "edge"
COLOURS = ("blue", "green")
WORKERS = 2
PATH = search_path()
_START_SECONDS = 10.0


def render(directory: Path, port: int, metrics_port: int) -> str:
    """nginx.conf as the role writes it, but on loopback, for the present user and with all its paths in `directory`.

    Raises subprocess.CalledProcessError where the template can't be rendered, ValueError where it doesn't have what is
    changed here.
    """
    settings = {
        "role_path": str(ROLE),
        "edge_port": f"127.0.0.1:{port}",
        "edge_metrics_address": f"127.0.0.1:{metrics_port}",
        "edge_user": pwd.getpwuid(os.geteuid()).pw_name,
        "edge_workers_per_colour": WORKERS,
        "edge_runtime_dir": str(directory / "run"),
        "edge_routing_dir": str(directory / "routing"),
        "ansible_python_interpreter": sys.executable,
    }
    rendered = directory / "rendered.conf"
    command = ["ansible", "localhost", "--inventory", "localhost,", "--connection", "local"]
    for variables in (f"@{ROLE}/defaults/main.yml", f"@{ROLE}/vars/main.yml", json.dumps(settings)):
        command += ["--extra-vars", variables]
    command += ["--module-name", "ansible.builtin.template"]
    command += ["--args", f"src={ROLE}/templates/nginx.conf.j2 dest={rendered} mode=0644"]
    subprocess.run(command, cwd=PROJECT, check=True, stdout=subprocess.PIPE, timeout=120)
    text = rendered.read_text()
    etc = Path(shutil.which("nginx", path=PATH)).parents[2] / "etc/nginx"
    temporary = "".join(
        f"    {kind}_temp_path {directory}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    for there, here in (
        ("/run/nginx.pid", f"{directory}/nginx.pid"),
        ("/var/log/nginx/", f"{directory}/log/"),
        ("/etc/nginx/", f"{etc}/"),
        ("http {\n", f"http {{\n{temporary}"),
    ):
        if there not in text:
            raise ValueError(f"the configuration has no {there!r} any more")
        text = text.replace(there, here)
    return text


class Edge:
    """nginx with the role's configuration. `run` is the directory of the sockets that it looks for."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.run = directory / "run"
        for path in (directory / "log", self.run / "shadow", *(self.run / colour for colour in COLOURS)):
            path.mkdir(parents=True)
        self.port, self.metrics_port = free_port(), free_port()
        self.routing = Routing(directory / "routing", COLOURS)
        self.configuration = render(directory, self.port, self.metrics_port)

    @contextmanager
    def running(self, *prefix: str) -> Iterator[Process]:
        """nginx, from when it listens; `prefix` is put before its command. Raises BenchError where it ends instead."""
        file = self.directory / "nginx.conf"
        file.write_text(self.configuration)
        command = [*prefix, "nginx", "-c", str(file)]
        command += ["-e", str(self.directory / "log" / "error.log"), "-g", "daemon off;"]
        environment = {**os.environ, "PATH": PATH}
        process = Process(command, environment, self.directory, self.directory / "log" / "output")
        try:
            self._wait_for(process)
            yield process
        finally:
            process.stop()

    def _wait_for(self, process: Process) -> None:
        deadline = time.monotonic() + _START_SECONDS
        while True:
            process.check()
            with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", self.port)):
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"nginx doesn't listen after {_START_SECONDS:g} s: {process.output()}")
            time.sleep(0.01)

    def route(self, live: str, **more: object) -> float:
        """Switch to a state, `more` as in `State`; returns the monotonic time of it in seconds."""
        return self.routing.switch(State(live=live, since="2026-01-31T12:00:00Z", who="tester", **more))[1]

    @contextmanager
    def connection(self) -> Iterator[http.client.HTTPConnection]:
        """A connection of a client."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        try:
            yield connection
        finally:
            connection.close()

    def ask(
        self,
        path: str = "/predict",
        headers: Mapping[str, str] | None = None,
        method: str = "POST",
        body: bytes | Iterator[bytes] = b"{}",
        connection: http.client.HTTPConnection | None = None,
    ) -> Answer:
        """One request, on a connection of its own unless one is given. A body that is an iterator is sent in chunks."""
        if not isinstance(body, bytes):
            headers = {**(headers or {}), "Transfer-Encoding": "chunked"}
            body = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in body) + b"0\r\n\r\n"
        if connection is None:
            with self.connection() as fresh:
                return self.ask(path, headers, method, body, fresh)
        return exchange(connection, method, path, body, dict(headers or {}), timeout=30)

    @contextmanager
    def shadow(self, answer: Callable[[Request], bytes]) -> Iterator[None]:
        """Somebody listens for copies of requests."""
        listener = Listener(self.run / "shadow" / "shadow.sock", answer)
        try:
            yield
        finally:
            listener.stop()

    def log(self, environment: str = "prod") -> list[dict]:
        """The access log so far."""
        lines = (self.directory / "log" / f"{environment}_access.log").read_text().splitlines()
        return [json.loads(line) for line in lines]


class Request(NamedTuple):
    """What a stand-in was sent; header names in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128


class Listener:
    """HTTP on a Unix socket: `answer` gets each request and returns all the bytes of an answer."""

    def __init__(self, path: Path, answer: Callable[[Request], bytes]) -> None:
        self._path = path
        self._connections: set[socket.socket] = set()
        listener = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                listener._connections.add(self.connection)
                with suppress(OSError):
                    while (request := _read_request(self.rfile)) is not None:
                        self.wfile.write(answer(request))
                listener._connections.discard(self.connection)

        self._server = _Server(str(path), Handler)
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        """End it with all its connections, of which nginx keeps some."""
        self._server.shutdown()
        self._server.server_close()
        self._path.unlink()
        for connection in list(self._connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


def _read_request(stream) -> Request | None:
    words = stream.readline().decode().split()
    if not words:
        return None
    headers = {}
    while line := stream.readline().decode("latin-1").strip():
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    # nginx hands on whole bodies only, so that their length is known.
    return Request(words[0], words[1], headers, stream.read(int(headers.get("content-length", 0))))


def answer(status: str, about: Mapping[str, object], **headers: str) -> bytes:
    """An answer in JSON."""
    body = json.dumps(about).encode()
    lines = [f"HTTP/1.1 {status}", f"Content-Length: {len(body)}"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


class Colour:
    """A colour that says who it is, by which socket, and what it was sent."""

    def __init__(self, run: Path, name: str) -> None:
        self.name = name
        self._directory = run / name
        self.start()

    def start(self) -> None:
        """Listen."""
        sockets = ["control", *(f"worker-{number}" for number in range(WORKERS))]
        self._listeners = [Listener(self._directory / f"{name}.sock", self._answers(name)) for name in sockets]

    def stop(self) -> None:
        """End it; `start` brings it back."""
        for listener in self._listeners:
            listener.stop()

    @contextmanager
    def down(self) -> Iterator[None]:
        """It is dead for a while."""
        self.stop()
        try:
            yield
        finally:
            self.start()

    def _answers(self, socket_name: str) -> Callable[[Request], bytes]:
        def answers(request: Request) -> bytes:
            about = {"colour": self.name, "socket": socket_name, **request._asdict(), "body": len(request.body)}
            return answer("200 OK", about, X_Model_Colour=self.name, X_Model_Version="1.0.0")

        return answers
