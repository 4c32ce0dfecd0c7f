"""An appliance in a temporary directory."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

SERVICE = Path(__file__).resolve().parents[3] / "service"
sys.path[:0] = [str(SERVICE), str(Path(__file__).parent)]

from rollout import cli, gate, host  # noqa: E402
from rollout.operations import Engine  # noqa: E402
from rollout_stand_ins import COLOURS, FakeFrontDoor, FakeHost  # noqa: E402

# `python3 -m rollout`, with the box's Locust.
ENGINE = """
import pathlib, signal, sys
# Whoever starts the tests in the background has it ignored, and what they start with them.
signal.signal(signal.SIGINT, signal.default_int_handler)
from rollout import cli, gate
gate.LOCUST = pathlib.Path(sys.argv.pop(1))
cli.run()
"""


class Answer:
    def __init__(self, status, out, err):
        self.status, self.out, self.err = status, out, err
        last = out.strip().splitlines()[-1] if out.strip() else "{}"
        self.json = json.loads(last) if last.startswith("{") else {}
        self.message = self.json.get("message", "")


class Box:
    """The appliance and the ways to use it."""

    def __init__(self, root: Path):
        self.root = root
        self.state_dir, self.config_dir, self.runtime_dir = root / "s", root / "c", root / "r"
        for directory in (self.state_dir, self.config_dir, *(self.runtime_dir / c for c in COLOURS)):
            directory.mkdir(parents=True)
        self.routing = self.state_dir / "routing"
        self.host = FakeHost(root, self.config_dir, self.runtime_dir)
        self.door = FakeFrontDoor(root, self.routing, self.host)
        self.config = self.config_dir / "appliance.json"
        self.settings = {
            "colours": list(COLOURS),
            "state_dir": str(self.state_dir),
            "config_dir": str(self.config_dir),
            "runtime_dir": str(self.runtime_dir),
            "lock_file": str(root / "lock"),
            "unit": "model@{colour}.service",
            "front_door": self.door.url,
            "ready_timeout_seconds": 1.5,
            "verify_requests": 3,
            "request_timeout_seconds": 2,
            "access_log": str(self.door.access_log),
            "bake_seconds": 0,
            "gate": {"enabled": False},
            "metrics_file": str(root / "appliance.prom"),
        }
        self.configure()
        self.capsys = None
        self.locust = root / "locust"

    def configure(self, **changes):
        self.settings.update(changes)
        self.config.write_text(json.dumps(self.settings))

    def run(self, *arguments, json_output=True):
        """Run a command in this process."""
        command = ["--config", str(self.config), *(["--json"] if json_output else []), *map(str, arguments)]
        self.capsys.readouterr()
        try:
            status = cli.main(command)
        except SystemExit as end:
            status = end.code
        out, err = self.capsys.readouterr()
        return Answer(status, out, err)

    def popen(self, *arguments):
        """Start a command in a process of its own."""
        return subprocess.Popen(
            [
                sys.executable,
                "-c",
                ENGINE,
                str(self.locust),
                "--config",
                str(self.config),
                "--json",
                *map(str, arguments),
            ],
            env={**os.environ, "PYTHONPATH": str(SERVICE)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def finish(self, process, timeout=20):
        out, err = process.communicate(timeout=timeout)
        return Answer(process.returncode, out, err)

    def bundle(self, version="1.0.0", factor=0.5, name="simplemodel"):
        directory = self.state_dir / "bundles" / name / version
        directory.mkdir(parents=True)
        (directory / "manifest.yaml").write_text(f"name: {name}\nversion: {version}\n")
        (directory / "model.py").write_text("# nothing\n")
        (directory / "weights.pth").write_text(str(factor))
        examples = [{"request": {"data": [1.0, 2.0]}, "response": {"output": 3 * factor}, "tolerance": 1e-4}] * 2
        (directory / "examples.json").write_text(json.dumps({"examples": examples}))
        self.seal(directory)
        return directory

    def seal(self, directory):
        lines = []
        for path in sorted(directory.rglob("*")):
            if path.is_file() and path.name != "SHA256SUMS":
                digest = hashlib.sha256(path.read_bytes()).hexdigest()
                lines.append(f"{digest}  {path.relative_to(directory)}\n")
        (directory / "SHA256SUMS").write_text("".join(lines))

    def deploy(self, colour, directory, image="appliance/model:1", *more, **options):
        return self.run("deploy", colour, "--bundle", directory, "--image", image, *more, **options)

    def live_on_blue(self):
        """Release 1 live on blue, release 2 idle on green."""
        assert self.deploy("blue", self.bundle("1.0.0", 0.5)).status == 0
        assert self.run("init", "blue").status == 0
        assert self.deploy("green", self.bundle("2.0.0", 0.75)).status == 0
        return self

    def engine(self, **options):
        from rollout import config

        return Engine(config.load(self.config), "tester", **options)

    @property
    def state(self):
        """The routing state as a reader sees it."""
        return self.engine().routing.read()

    def audit(self):
        path = self.state_dir / "audit.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def snapshot(self):
        """Everything under the routing directory, byte for byte."""
        about = {}
        for path in sorted(self.routing.rglob("*")):
            if path.is_symlink():
                about[str(path)] = os.readlink(path)
            elif path.is_file():
                about[str(path)] = path.read_bytes()
            else:
                about[str(path)] = None
        return about


@pytest.fixture
def box(monkeypatch, capsys):
    # Socket paths are limited to 107 bytes, and pytest's own temporary directories are long.
    root = Path(tempfile.mkdtemp(prefix="ro-", dir="/tmp"))
    box = Box(root)
    box.capsys = capsys
    monkeypatch.setenv("PATH", f"{box.host.programs}:{os.environ['PATH']}")
    monkeypatch.setenv("DOCKER_HOST", f"unix://{box.host.docker_socket}")
    # What other machines take from this one says nothing about the engine.
    monkeypatch.setattr(host, "processor", lambda: host.Processor(0, 0))
    run = subprocess.run
    # The engine's commands only: a test may run programs of its own.
    mine = lambda command: Path(command[0]).parent == box.host.programs  # noqa: E731
    monkeypatch.setattr(subprocess, "run", lambda c, **options: (box.host.run if mine(c) else run)(c, **options))
    monkeypatch.setattr(gate, "LOCUST", box.locust)
    monkeypatch.setenv("SUDO_USER", "alice")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    yield box
    box.door.stop()
    box.host.close()
    shutil.rmtree(root, ignore_errors=True)
