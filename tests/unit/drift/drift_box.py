"""A host with a live bundle, the service on it, and Kafka: librdkafka's mock cluster, in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

TESTS = Path(__file__).resolve().parent
SERVICE = TESTS.parents[2] / "service"
# Generous, since a busy machine is slow: reached only where something is wrong.
LIMIT_SECONDS = 120
EDGES = [-1.2, -0.9, -0.6, -0.3, 0.0, 0.3, 0.6, 0.9, 1.2]


def reference(**edges):
    """The content of a reference.json: features with their edges, of values spread evenly from -1.5 to 1.5."""
    features = [
        {
            **{"name": name, "center": 0.0, "scale": 0.866, "mean": 0.0, "std": 0.866 if inner else 0.0},
            **{"minimum": -1.5, "maximum": 1.5, "edges": inner},
            "ratios": [1 / (len(inner) + 1)] * (len(inner) + 1) if inner else [],
        }
        for name, inner in (edges or {"x1": EDGES, "x2": EDGES}).items()
    ]
    return {"count": 4000, "features": features}


def wait_until(condition):
    """What the condition answers, as soon as that is true."""
    end = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < end:
        if answer := condition():
            return answer
        time.sleep(0.05)
    raise AssertionError(f"waited {LIMIT_SECONDS} s in vain for {condition.__name__}: {condition()!r}")


class Kafka:
    """The mock cluster, and a producer for it."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, TESTS / "mock_kafka.py"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.address = self.process.stdout.readline().strip()

    def send(self, topic, *values, partition=None):
        """Send values: bytes as they are, all else as JSON."""
        from confluent_kafka import Producer

        options = {} if partition is None else {"partition": partition}
        producer = Producer({"bootstrap.servers": self.address})
        for value in values:
            producer.produce(topic, value if isinstance(value, bytes) else json.dumps(value).encode(), **options)
            producer.poll(0)
        assert producer.flush(LIMIT_SECONDS) == 0

    def stop(self):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class Box:
    """A host: `routing`, `config` and `state` as on a real one, and the service."""

    def __init__(self, root):
        self.root, self.state = root, root / "state"
        self.appliance, self.etc = root / "appliance", root / "etc"
        for directory in (self.state, self.appliance / "routing/states", self.etc):
            directory.mkdir(parents=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.config = self.etc / "drift.json"
        self.process = None
        self._states = 0

    def configure(self, address, **changes):
        settings = {
            # Quick where a real one is patient.
            "kafka": {"bootstrap.servers": address, "reconnect.backoff.max.ms": 500},
            "topics": {"simplemodel": "rows"},
            "listen_address": f"127.0.0.1:{self.port}",
            "state_dir": str(self.state),
            "appliance_dir": str(self.appliance),
            "config_dir": str(self.etc),
            "save_seconds": 0.1,
        }
        self.config.write_text(json.dumps({**settings, **changes}))

    def bundle(self, version="1.0.0", content=None, name="simplemodel"):
        directory = self.root / "bundles" / name / version
        directory.mkdir(parents=True)
        (directory / "manifest.yaml").write_text(f"name: {name}\nversion: {version}\nreference: reference.json\n")
        (directory / "reference.json").write_text(json.dumps(content or reference()))
        return directory

    def make_live(self, colour, bundle):
        (self.etc / f"{colour}.env").write_text(f"MODEL_IMAGE=sha256:0\nMODEL_BUNDLE={bundle}\nMODEL_RELEASE=1\n")
        self._states += 1
        routing = self.appliance / "routing"
        state = routing / "states" / str(self._states)
        state.mkdir()
        (state / colour).touch()
        (routing / ".new").symlink_to(state)
        os.rename(routing / ".new", routing / "current")

    def start(self):
        with open(self.root / "log", "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "drift", "--config", self.config],
                env={**os.environ, "PYTHONPATH": str(SERVICE)},
                stderr=log,
            )

    def kill(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    def terminate(self):
        self.process.terminate()
        return self.process.wait(LIMIT_SECONDS)

    @property
    def log(self):
        return (self.root / "log").read_text()

    def metrics(self):
        """What the service exports; nothing while it doesn't answer."""
        with contextlib.suppress(OSError):
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=LIMIT_SECONDS) as answer:
                lines = answer.read().decode().splitlines()
            return {key: float(value) for key, _, value in (x.rpartition(" ") for x in lines if not x.startswith("#"))}
        return {}

    def rows(self, status="ok"):
        return self.metric("training_rows_total", model="simplemodel", status=status)

    def metric(self, name, **labels):
        """The only sample of that name with these labels among its own; None where there is none."""
        wanted = {f'{key}="{value}"' for key, value in labels.items()}
        found = [
            value
            for key, value in self.metrics().items()
            if key.split("{")[0] == name and wanted <= set(key.partition("{")[2].rstrip("}").split(","))
        ]
        assert len(found) < 2, f"{name} {labels}: {found}"
        return found[0] if found else None
