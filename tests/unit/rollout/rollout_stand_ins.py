"""Stand-ins for systemd, docker, the model containers and nginx.

`systemctl`, `systemd-run`, `docker` and `journalctl` are small programs on PATH that ask `FakeHost`, which lives in the
test's process and serves docker's own socket, too. A started unit becomes a `FakeColour`, which serves HTTP on Unix
sockets as the model container does. The `FakeFrontDoor` decides by the routing's flag files, afresh for every request,
exactly as nginx does.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import http.server
import itertools
import json
import os
import select
import socket
import socketserver
import subprocess
import sys
import threading
import time
from pathlib import Path

COLOURS = ("blue", "green")
PROGRAM = """#!{python} -SE
# Stand-in for {name}: asks the test's process.
import json, socket, sys
s = socket.socket(socket.AF_UNIX)
s.connect({path!r})
s.sendall(json.dumps(["{name}", *sys.argv[1:]]).encode() + b"\\n")
answer = json.loads(s.makefile().readline())
sys.stdout.write(answer["out"])
sys.stderr.write(answer["err"])
sys.exit(answer["rc"])
"""

# What a load test comes to that is good enough.
MEASURED = {
    "locust": "2.0",
    "start": "2026-01-31T12:00:00Z",
    "end": "2026-01-31T12:00:10Z",
    "duration_seconds": 10.0,
    "requests": 400,
    "failures": 0,
    "errors": {},
    "p50_ms": 5.0,
    "p95_ms": 20.0,
    "p99_ms": 30.5,
    "max_ms": 90.0,
}


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # one packet for an answer, so that no delayed acknowledgement holds its body up

    def log_message(self, *_):
        pass

    def address_string(self):
        return "local"

    def do_GET(self):
        self.server.owner.answer(self, b"")

    def do_POST(self):
        self.server.owner.answer(self, self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def send(self, status, about, headers=None):
        self.sent = status
        body = about if isinstance(about, bytes) else json.dumps(about).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Server(socketserver.ThreadingMixIn, socketserver.TCPServer):
    daemon_threads = True
    allow_reuse_address = True
    block_on_close = False

    def handle_error(self, *_):
        pass


class UnixServer(Server):
    address_family = socket.AF_UNIX


def serve(address, owner):
    server = (UnixServer if isinstance(address, str) else Server)(address, Handler)
    server.owner = owner
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.005}, daemon=True).start()
    return server


class FakeColour:
    """A running model container. `faults`: what is wrong with it.

    `in_progress` has what `/metrics` says about its requests at each look, and goes on with the last.
    """

    def __init__(self, directory: Path, colour: str, env: dict[str, str], faults: set[str]):
        self.directory, self.colour, self.env, self.faults = directory, colour, env, faults
        bundle = Path(env["MODEL_BUNDLE"])
        self.name, self.version = bundle.parent.name, bundle.name
        self.digest = "sha256:" + hashlib.sha256((bundle / "SHA256SUMS").read_bytes()).hexdigest()
        self.factor = float((bundle / "weights.pth").read_text())
        self.status = "starting" if "hang" in faults else "ready"
        self.workers = 2
        self.asked = 0
        self.looked_at = 0
        self.in_progress = [0]
        self.servers = []
        for name in ["control.sock", *(f"worker-{i}.sock" for i in range(self.workers))]:
            path = directory / name
            path.unlink(missing_ok=True)
            self.servers.append(serve(str(path), self))
        (directory / "startup_error.json").unlink(missing_ok=True)

    def health(self):
        self.looked_at += 1
        return {
            "status": self.status,
            "reason": None if self.status == "ready" else "the model is \x1b[31mwarming up",
            "colour": self.colour,
            "release": self.env["MODEL_RELEASE"],
            "model": self.name,
            "version": self.version,
            "bundle_digest": self.digest,
            "workers": {"wanted": self.workers, "ready": self.workers, "restarts": 0},
        }

    def predict(self, body):
        self.asked += 1
        if "predict-500" in self.faults or ("some-500" in self.faults and self.asked > 30 and self.asked % 5 == 0):
            return 500, {"error": "boom"}
        if "slow" in self.faults and self.asked > 30:
            time.sleep(0.03)
        data = json.loads(body)["data"]
        if "narrow" in self.faults and len(data) != 2:
            return 422, {"error": "two numbers"}
        if "by-length" in self.faults:
            time.sleep(0.001 * len(data))
        return 200, {"output": round(sum(data) * self.factor, 6) + (1 if "wrong" in self.faults else 0)}

    def answer(self, handler, body):
        if handler.path == "/health":
            if "drip" in self.faults:
                handler.send_response(200)
                with contextlib.suppress(OSError):
                    for _ in range(100):
                        handler.wfile.write(b"x")
                        handler.wfile.flush()
                        time.sleep(0.1)
                return
            handler.send(200 if self.status in ("ready", "degraded") else 503, self.health())
        elif handler.path == "/metrics":
            count = self.in_progress.pop(0) if len(self.in_progress) > 1 else self.in_progress[0]
            handler.send(200, f'model_requests_in_progress{{model="{self.name}"}} {count}\n'.encode())
        else:
            handler.send(*self.predict(body), {"X-Model-Colour": self.colour})

    def stop(self):
        for server in self.servers:
            server.shutdown()
            server.server_close()
        for path in self.directory.glob("*.sock"):
            path.unlink()


class FakeFrontDoor:
    """nginx. `faults`: a colour's name answers 502; `sticky` keeps old connections on the old colour; `mute` says
    something that isn't HTTP while blue is live. A colour in `hangs` answers when the front door stops.

    `sheds` holds what the next answers of the live colour have instead of its own: (status, colour), oldest first.
    A split is served by turns, and each prediction leaves its line in the access log.
    """

    def __init__(self, root: Path, routing: Path, host: FakeHost):
        self.routing, self.host, self.faults, self.requests = routing, host, set(), []
        self.sheds, self._serial = [], itertools.count()
        self.slow = 0.0
        self.hangs, self._over = set(), threading.Event()
        self.access_log = root / "access.log"
        self.access_log.touch()
        self.server = serve(("127.0.0.1", 0), self)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def live(self):
        for colour in COLOURS:
            if os.path.isfile(self.routing / "current" / colour):
                return colour
        return None

    def routed(self, path, headers):
        """The colour for a request, as the edge decides."""
        live = self.live()
        track = "idle" if path.startswith("/test/") else headers["X-Model-Track"]
        if track is None:
            bucket = next(self._serial) * 37 % 100
            track = "idle" if os.path.isfile(self.routing / "current/split" / str(bucket)) else "live"
        return {"blue": "green", "green": "blue"}.get(live) if track == "idle" else live

    def answer(self, handler, body):
        started = time.monotonic()
        self._answer(handler, body)
        line = {
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "method": handler.command,
            "path": handler.path.partition("?")[0],
            "status": handler.sent,
            "request_id": handler.headers["X-Request-ID"],
            "routed": handler.routed,
            "request_seconds": round(time.monotonic() - started, 3),
            "upstream_seconds": f"{time.monotonic() - started:.3f}",
        }
        with self.access_log.open("a") as stream:
            stream.write(json.dumps(line) + "\n")

    def _answer(self, handler, body):
        colour = handler.routed = self.routed(handler.path, handler.headers)
        if "sticky" in self.faults:
            colour = handler.__dict__.setdefault("first_colour", colour)
        # Not its id(): that of a connection that has ended may be used again.
        self.requests.append((handler.__dict__.setdefault("serial", next(self._serial)), colour))
        running = self.host.running.get(colour)
        time.sleep(self.slow)
        if colour in self.hangs:
            self._over.wait()
        if colour is None:
            handler.send(503, {"error": "no colour is live"})
        elif running is None or colour in self.faults:
            handler.send(502, {"error": "bad gateway"})
        elif "mute" in self.faults and colour == "blue":
            handler.sent = 0
            handler.wfile.write(b"what?\r\n\r\n")
        elif self.sheds and "before" not in handler.headers["X-Request-ID"]:
            status, named = self.sheds.pop(0)
            handler.send(status, {"error": "busy"}, {"X-Model-Colour": named})
        elif "stuck" in running.faults and running.asked > 30:
            # Until the client has gone.
            select.select([handler.connection], [], [], 30)
            handler.sent, handler.close_connection = 499, True
        else:
            handler.send(*running.predict(body), {"X-Model-Colour": colour})

    def stop(self):
        self._over.set()
        self.server.shutdown()
        self.server.server_close()


class FakeHost:
    """systemd, docker and the journal."""

    def __init__(self, root: Path, config_dir: Path, runtime_dir: Path):
        self.config_dir, self.runtime_dir = config_dir, runtime_dir
        self.images = {"appliance/model:1": "sha256:" + "1" * 64, "appliance/model:2": "sha256:" + "2" * 64}
        self.faults: dict[str, set[str]] = {}
        """By bundle version: reject, crash, exit, hang, wrong, predict-500, refuse-start, stale, drip, narrow (takes
        two numbers), by-length (1 ms for each number); and, from the 31st prediction on, some-500 (every fifth), slow
        (30 ms), stuck (never; through the front door only)."""
        self.running: dict[str, FakeColour] = {}
        self.units = {c: self._unit("inactive") for c in COLOURS}
        self.enabled: set[str] = set()
        self.journal: dict[str, str] = {}
        # Journal entries about units whose process was killed.
        self.killed = ""
        self.start_watch = (0, "", "")
        self.calls: list[list[str]] = []
        self.docker_fault: tuple[int, object] | None = None
        """What docker's daemon answers instead: a status, and what its body holds."""
        self.load: subprocess.Popen | None = None
        """The load test that runs."""
        self._starts = 0
        self._path = str(root / "host.sock")
        self._lock = threading.Lock()
        programs = root / "bin"
        programs.mkdir()
        for name in ("systemctl", "systemd-run", "docker", "journalctl"):
            (programs / name).write_text(PROGRAM.format(python=sys.executable, name=name, path=self._path))
            (programs / name).chmod(0o755)
        self.programs = programs
        self.docker_socket = str(root / "docker.sock")
        self.docker = serve(self.docker_socket, self)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self._path)
        self._listener.listen(32)
        threading.Thread(target=self._serve, daemon=True).start()

    def _unit(self, active, result="success", status="0", restarts=0, sub=None):
        return {
            "ActiveState": active,
            "SubState": sub or {"active": "running", "failed": "failed"}.get(active, "dead"),
            "Result": result,
            "ExecMainStatus": status,
            "InvocationID": f"{getattr(self, '_starts', 0):032x}" if active != "inactive" else "",
            "NRestarts": restarts,
        }

    def _serve(self):
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            # Each by itself: a load test is under way for long, and others are asked meanwhile.
            threading.Thread(target=self._serve_one, args=(connection,), daemon=True).start()

    def _serve_one(self, connection):
        with connection, contextlib.suppress(OSError):
            line = connection.makefile().readline()
            # Nothing, where a signal has ended the program before it could ask.
            if not line:
                return
            rc, out, err = self._ask(json.loads(line))
            connection.sendall(json.dumps({"rc": rc, "out": out, "err": err}).encode() + b"\n")

    def _ask(self, command):
        if command[0] == "systemd-run":
            return self._run_load(command)
        with self._lock:
            self.calls.append(command)
            return self._do(command)

    def ask_from_afar(self, command):
        """As `_ask`, but from a forked process: what is started belongs to the first one."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.connect(self._path)
            connection.sendall(json.dumps(command).encode() + b"\n")
            answer = json.loads(connection.makefile().readline())
        return answer["rc"], answer["out"], answer["err"]

    def _run_load(self, command):
        self.calls.append(command)
        options = command[: command.index("--")]
        environment = dict(o.removeprefix("--setenv=").split("=", 1) for o in options if o.startswith("--setenv="))
        self.load = subprocess.Popen(
            command[len(options) + 1 :],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        out, err = self.load.communicate()
        return self.load.returncode, out, err

    def run(self, command, **options):
        """`subprocess.run` for the engine in the test's process: what the program does, without its interpreter.

        Commands in a process of their own (`Box.popen`) start the programs.
        """
        program = Path(command[0])
        assert program.parent == self.programs and options["timeout"] > 0
        rc, out, err = self._ask([program.name, *command[1:]])
        return subprocess.CompletedProcess(command, rc, out, err)

    def _do(self, command):
        if command[0] == "docker":
            return 1, "", "Error: No such image"
        if command[0] == "journalctl" and "EXIT_STATUS=137" in command:
            return 0, self.killed, ""
        if command[0] == "journalctl":
            colour = command[1].partition("@")[2].partition(".")[0]
            return 0, self.journal.get(colour, ""), ""
        if command[1] == "start":
            return self.start_watch
        if command[1:] == ["stop", "appliance-loadtest.service"]:
            if self.load:
                self.load.kill()
            return 0, "", ""
        verb, colour = command[1], command[-1].partition("@")[2].partition(".")[0]
        if verb == "show":
            return 0, "".join(f"{k}={v}\n" for k, v in self.units[colour].items()), ""
        if verb == "restart":
            return self.start(colour)
        if verb == "stop":
            self.stop(colour)
        elif verb == "enable":
            self.enabled.add(colour)
        elif verb == "is-enabled":
            return (0, "enabled\n", "") if colour in self.enabled else (1, "disabled\n", "")
        return 0, "", ""

    def answer(self, handler, _body):
        """What docker's daemon says about an image."""
        known = {**self.images, **{i: i for i in self.images.values()}}
        name = handler.path.removeprefix("/images/").removesuffix("/json")
        if self.docker_fault:
            handler.send(*self.docker_fault)
        elif name in known:
            handler.send(200, {"Id": known[name], "RepoTags": []})
        else:
            handler.send(404, {"message": f"No such image: {name}"})

    def start(self, colour):
        lines = (self.config_dir / f"{colour}.env").read_text().splitlines()
        env = dict(line.split("=", 1) for line in lines)
        faults = self.faults.get(Path(env["MODEL_BUNDLE"]).name, set())
        self._starts += 1
        if "stale" in faults:
            # The old process goes on answering; systemd says that the unit is active.
            self.units[colour] = self._unit("active")
            return 0, "", ""
        self.stop(colour)
        if "refuse-start" in faults:
            self.units[colour] = self._unit("failed", "resources")
            return 1, "", "Job for unit failed."
        if "reject" in faults:
            (self.runtime_dir / colour / "startup_error.json").write_text('{"reason": "weights.pth is \\u001b[1mbad"}')
            self.units[colour] = self._unit("failed", "exit-code", "78")
        elif "crash" in faults:
            self.journal[colour] = '{"level": "error", "message": "killed by the kernel"}\n'
            self.units[colour] = self._unit("activating", "signal", "9", restarts=4, sub="auto-restart")
        elif "exit" in faults:
            self.units[colour] = self._unit("inactive")
        else:
            self.running[colour] = FakeColour(self.runtime_dir / colour, colour, env, faults)
            self.units[colour] = self._unit("active")
        return 0, "", ""

    def stop(self, colour):
        running = self.running.pop(colour, None)
        if running:
            running.stop()
        self.units[colour] = self._unit("inactive")

    def close(self):
        if self.load:
            self.load.kill()
        self._listener.close()
        self.docker.shutdown()
        self.docker.server_close()
        for colour in list(self.running):
            self.stop(colour)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)
