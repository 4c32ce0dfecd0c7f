"""The servers that are measured: the model service and its peers, each as `python -m venv` and pip install it."""

from __future__ import annotations

import http.client
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.generators import Body
from benchmarks.processes import Process
from benchmarks.report import ROOT, BenchError, reason

PEERS = ROOT / "benchmarks" / "peers"
SIMPLEMODEL = ROOT / "bundles" / "simplemodel" / "1.0.0"
WORKERS = 2
_START_SECONDS = 120.0
_INSTALL_SECONDS = 900.0
_TOLERANCE = 1e-4


@dataclass
class Server:
    """One that runs and answers. `sockets` are the control socket and the workers' own; peers have none."""

    name: str
    process: Process
    port: int
    path: str
    seconds_to_ready: float
    sockets: Path | None = None

    def worker_addresses(self) -> list[str]:
        """Where the edge sends requests: to the workers' own sockets in turn."""
        return [f"unix:{path}" for path in sorted(self.sockets.glob("worker-*.sock"))]

    def url(self, path: str | None = None) -> str:
        return f"http://127.0.0.1:{self.port}{path or self.path}"


@dataclass(frozen=True)
class Plan:
    """How to start a peer: its command, where, and with which variables beside the program's own."""

    command: Sequence[str]
    folder: Path
    variables: Mapping[str, str]
    path: str = "/predict"


@contextmanager
def ours(bundle: Path = SIMPLEMODEL, workers: int = WORKERS) -> Iterator[Server]:
    """The model service as it is in production, with its log in a file, but without its container."""
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/var/tmp") as folder:
        sockets = Path(folder) / "run"
        sockets.mkdir()
        port = free_port()
        environment = {
            **_production_settings(os.environ),
            "PYTHONPATH": str(ROOT / "service"),
            "MODEL_BUNDLE_DIR": str(bundle),
            "MODEL_SOCKET_DIR": str(sockets),
            "MODEL_WORKERS": str(workers),
            "MODEL_HOST": "127.0.0.1",
            "MODEL_PORT": str(port),
        }
        command = [sys.executable, "-m", "model_server"]
        with _running("model service", command, environment, ROOT / "service", Path(folder), port) as server:
            server.sockets = sockets
            server.seconds_to_ready = _wait(server, lambda: _get_status(server.url("/health")) == 200)
            yield server


@contextmanager
def peer(name: str, environments: Path) -> Iterator[Server]:
    """A peer with two processes that serve simplemodel; installed first where it isn't yet."""
    python = install(name, environments)
    with tempfile.TemporaryDirectory(prefix="bench-", dir="/var/tmp") as folder:
        port = free_port()
        plan = _PLANS[name](python, port, Path(folder))
        variables = {
            "PATH": f"{python.parent}:{os.environ['PATH']}",
            "PYTHONPATH": str(PEERS),
            "BENCH_BUNDLE": str(SIMPLEMODEL),
            "OMP_NUM_THREADS": "1",
            # Nothing may appear beside the bundle's files.
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        environment = {**os.environ, **variables, **plan.variables}
        with _running(name, plan.command, environment, plan.folder, Path(folder), port) as server:
            server.path = plan.path
            body, expected = simplemodel_example()
            server.seconds_to_ready = _wait(server, lambda: _answers(server, body, expected))
            yield server


def install(name: str, environments: Path) -> Path:
    """The Python of a peer's virtual environment, which is made where it's missing or of other versions."""
    required = (PEERS / name / "requirements.txt").read_text()
    folder = environments / name
    python, installed = folder / "bin" / "python", folder / "installed.txt"
    if installed.exists() and installed.read_text() == required:
        return python
    print(f"installing {name} in {folder} …", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    requirements = str(PEERS / name / "requirements.txt")
    for command in (
        [sys.executable, "-m", "venv", str(folder)],
        [str(python), "-m", "pip", "install", "--quiet", "--requirement", requirements],
    ):
        try:
            done = subprocess.run(command, text=True, capture_output=True, timeout=_INSTALL_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise BenchError(f"doesn't install within {_INSTALL_SECONDS:g} s") from error
        if done.returncode != 0:
            raise BenchError(f"doesn't install: {reason(done.stderr)}")
    installed.write_text(required)
    return python


def simplemodel_example() -> tuple[Body, float]:
    """The first example of the bundle: what is posted, and the number that must come back."""
    example = json.loads((SIMPLEMODEL / "examples.json").read_text())["examples"][0]
    return Body(json.dumps(example["request"]).encode()), example["response"]["output"]


def post(url: str, body: Body, timeout: float = 10.0) -> tuple[int, bytes, http.client.HTTPMessage]:
    """Status, body and headers of one answer. Raises OSError, http.client.HTTPException."""
    host, _, path = url.removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(host, timeout=timeout)
    try:
        connection.request("POST", f"/{path}", body.data, body.headers)
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.headers
    finally:
        connection.close()


def check_answer(server: Server, patience: float = 0.0) -> None:
    """Raise BenchError unless the server answers simplemodel's example rightly: a wrong answer isn't worth timing.

    For `patience` seconds it may answer 503, as one does whose queue is still full from the load before.
    """
    body, expected = simplemodel_example()
    try:
        if patience:
            _wait(server, lambda: post(server.url(), body)[0] != 503, patience)
        status, data, _ = post(server.url(), body)
    except (OSError, http.client.HTTPException) as error:
        raise BenchError(f"{server.name} doesn't answer: {error}") from error
    if not _is_right(status, data, expected):
        raise BenchError(f"{server.name} answers {status} {data[:200]!r}, not 200 and {expected}")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextmanager
def _running(
    name: str, command: Sequence[str], environment: Mapping[str, str], directory: Path, scratch: Path, port: int
) -> Iterator[Server]:
    process = Process(command, environment, directory, scratch / "server.log")
    try:
        yield Server(name, process, port, "/predict", 0.0)
    finally:
        process.stop()


def _wait(server: Server, is_ready: Callable[[], bool], limit: float = _START_SECONDS) -> float:
    """Seconds from its start until it is ready. Raises BenchError where it ends before, or isn't by `limit`."""
    started = time.monotonic()
    while not is_ready():
        server.process.check()
        if time.monotonic() - started > limit:
            raise BenchError(f"isn't ready after {limit:g} s: {reason(server.process.output())}")
        time.sleep(0.01)
    return time.monotonic() - server.process.started


def _answers(server: Server, body: Body, expected: float) -> bool:
    try:
        status, data, _ = post(server.url(), body)
    except (OSError, http.client.HTTPException):
        return False
    return _is_right(status, data, expected)


def _is_right(status: int, data: bytes, expected: float) -> bool:
    try:
        return status == 200 and math.isclose(json.loads(data)["output"], expected, abs_tol=_TOLERANCE)
    except (ValueError, KeyError, TypeError):
        return False


def _get_status(url: str) -> int | None:
    host, _, path = url.removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(host, timeout=5)
    try:
        connection.request("GET", f"/{path}")
        return connection.getresponse().status
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


def _production_settings(environment: Mapping[str, str]) -> dict[str, str]:
    """The caller's variables, without the model service's settings and what keeps Python from compiling packages once.

    In the image they are compiled.
    """
    kept = {name: value for name, value in environment.items() if not name.startswith("MODEL_")}
    kept.pop("PYTHONDONTWRITEBYTECODE", None)
    return kept


def _fastapi(python: Path, port: int, scratch: Path) -> Plan:
    command = [str(python), "-m", "uvicorn", "app:app", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--workers", str(WORKERS), "--loop", "uvloop", "--http", "httptools", "--no-access-log"]
    return Plan(command, PEERS / "fastapi", {})


def _flask(python: Path, port: int, scratch: Path) -> Plan:
    command = [str(python), "-m", "gunicorn", "app:app", "--bind", f"127.0.0.1:{port}"]
    command += ["--workers", str(WORKERS), "--worker-class", "gthread", "--threads", "4"]
    return Plan(command, PEERS / "flask", {})


def _torchserve(python: Path, port: int, scratch: Path) -> Plan:
    archiver = [str(python.parent / "torch-model-archiver"), "--model-name", "simplemodel", "--version", "1.0"]
    archiver += ["--handler", str(PEERS / "torchserve" / "handler.py"), "--export-path", str(scratch)]
    archiver += ["--extra-files", f"{SIMPLEMODEL / 'model.py'},{SIMPLEMODEL / 'weights.pth'}"]
    done = subprocess.run(archiver, text=True, capture_output=True, timeout=60)
    if done.returncode != 0:
        raise BenchError(f"its archive can't be made: {reason(done.stderr)}")
    settings = {
        "inference_address": f"http://127.0.0.1:{port}",
        "management_address": f"http://127.0.0.1:{free_port()}",
        "metrics_address": f"http://127.0.0.1:{free_port()}",
        "grpc_inference_port": free_port(),
        "grpc_management_port": free_port(),
        "default_workers_per_model": WORKERS,
        "disable_token_authorization": "true",
    }
    configuration = scratch / "config.properties"
    configuration.write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    command = [str(python.parent / "torchserve"), "--start", "--foreground", "--no-config-snapshots"]
    command += ["--ts-config", str(configuration), "--model-store", str(scratch)]
    command += ["--models", "simplemodel=simplemodel.mar"]
    # It writes its logs where it is started.
    variables = {"TEMP": str(scratch), "LOG_LOCATION": str(scratch / "logs"), "METRICS_LOCATION": str(scratch / "logs")}
    return Plan(command, scratch, variables, "/predictions/simplemodel")


def _mosec(python: Path, port: int, scratch: Path) -> Plan:
    command = [str(python), "app.py", "--address", "127.0.0.1", "--port", str(port)]
    return Plan(command, PEERS / "mosec", {})


def _litserve(python: Path, port: int, scratch: Path) -> Plan:
    return Plan([str(python), "app.py"], PEERS / "litserve", {"BENCH_PORT": str(port)})


def _bentoml(python: Path, port: int, scratch: Path) -> Plan:
    command = [str(python), "-m", "bentoml", "serve", "app:Predict", "--host", "127.0.0.1", "--port", str(port)]
    variables = {"BENTOML_HOME": str(scratch), "BENTOML_DO_NOT_TRACK": "True"}
    return Plan(command, PEERS / "bentoml", variables)


_PLANS: Mapping[str, Callable[[Path, int, Path], Plan]] = {
    "fastapi": _fastapi,
    "flask": _flask,
    "torchserve": _torchserve,
    "mosec": _mosec,
    "litserve": _litserve,
    "bentoml": _bentoml,
}
PEER_NAMES = tuple(_PLANS)
