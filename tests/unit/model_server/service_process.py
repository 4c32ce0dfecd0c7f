"""The real processes of a container, for tests: started, asked and stopped."""

import contextlib
import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bundle_making import ROOT, write_sums

SECONDS = 60


class Connection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(SECONDS)
        self.sock.connect(str(self._path))


class Service:
    """One running container's worth of processes."""

    def __init__(self, directory: Path, bundle: Path, **settings: object) -> None:
        self.directory = directory
        self.log_file = directory / "log"
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT / "service"),
            "MODEL_COLOUR": "green",
            "MODEL_RELEASE": "7",
            "MODEL_WORKERS": "2",
            "MODEL_BUNDLE_DIR": str(bundle),
            "MODEL_SOCKET_DIR": str(directory),
            "TMPDIR": str(directory),
            **{name: str(value) for name, value in settings.items()},
        }
        with open(self.log_file, "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "model_server"], env=environment, stdout=log, stderr=subprocess.STDOUT
            )

    def ask(self, name: str, method: str, path: str, body: bytes | None = None, **headers: str):
        """The status, the headers and the body of an answer."""
        connection = Connection(self.directory / f"{name}.sock")
        try:
            # What is too large is answered and closed while the client may still be sending it.
            with contextlib.suppress(BrokenPipeError):
                connection.request(method, path, body, {key.replace("_", "-"): value for key, value in headers.items()})
            response = connection.getresponse()
            return response.status, response.headers, response.read()
        finally:
            connection.close()

    def predict(self, data: object, worker: int = 0, **headers: str):
        return self.ask(f"worker-{worker}", "POST", "/predict", json.dumps({"data": data}).encode(), **headers)

    def health(self) -> tuple[int, dict]:
        status, _, body = self.ask("control", "GET", "/health")
        return status, json.loads(body)

    def metrics(self) -> dict[str, float]:
        lines = self.ask("control", "GET", "/metrics")[2].decode().splitlines()
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}

    def wait_for(self, condition, what: str) -> None:
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            try:
                if condition():
                    return
            except (OSError, http.client.HTTPException):
                pass
            assert self.process.poll() is None, self.log_file.read_text()
            time.sleep(0.02)
        raise AssertionError(f"never {what}: {self.log_file.read_text()}")

    def wait_ready(self) -> None:
        self.wait_for(lambda: self.health()[1]["status"] == "ready", "ready")

    def children(self) -> list[int]:
        pid = self.process.pid
        return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def logs(self) -> list[dict]:
        return [json.loads(line) for line in self.log_file.read_text().splitlines()]


@contextmanager
def running(directory: Path, bundle: Path, **settings: object) -> Iterator[Service]:
    service = Service(directory, bundle, **settings)
    try:
        yield service
    finally:
        service.process.kill()
        service.process.wait()


def slow(bundle: Path, seconds: float, width: int = 1) -> None:
    """Make the model slow where the first number of a row is 9, and its answers ``width`` numbers wide.

    Otherwise it takes a few milliseconds, so that it gets a thread of its own.
    """
    source = (bundle / "model.py").read_text()
    source = source.replace(
        "return self.layers(rows)",
        f"import time\n        time.sleep({seconds} if rows[0, 0] == 9 else 0.003)\n"
        f"        return self.layers(rows).repeat(1, {width})",
    )
    (bundle / "model.py").write_text(source)
    if width > 1:
        manifest = (bundle / "manifest.yaml").read_text()
        (bundle / "manifest.yaml").write_text(manifest.replace("shape: [1]", f"shape: [{width}]"))
        document = json.loads((bundle / "examples.json").read_text())
        for example in document["examples"]:
            output = example["response"]["output"]
            wide = [[value] * width for value in output] if isinstance(output, list) else [output] * width
            example["response"]["output"] = wide
        (bundle / "examples.json").write_text(json.dumps(document))
    write_sums(bundle)


def in_background(count: int, call) -> tuple[list, list[threading.Thread]]:
    results: list = []

    def run() -> None:
        try:
            results.append(call())
        except Exception as error:
            results.append(error)

    threads = [threading.Thread(target=run) for _ in range(count)]
    for thread in threads:
        thread.start()
    return results, threads


def load(service: Service) -> tuple[float, float]:
    """Requests that are accepted and not answered, and those of them that wait."""
    found = service.metrics()
    label = '{model="simplemodel"}'
    return found[f"model_requests_in_progress{label}"], found[f"model_queue_depth{label}"]
