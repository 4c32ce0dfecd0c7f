"""What the checks of a provisioned host share: its front door, its engine, and the journal when a check fails."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

# A hook: pytest finds it by its name.
from tests.reruns import pytest_terminal_summary  # noqa: F401

PROJECT = Path(__file__).resolve().parent.parent
LAB_NAME = os.environ.get("LAB_NAME") or "molecule"
EXAMPLE = {"data": [0.2, 0.6]}


@dataclass(frozen=True)
class Answer:
    """One answer of the edge: status, headers in lower case, and the body as text."""

    status: int
    headers: dict[str, str]
    text: str

    @property
    def json(self) -> Any:
        return json.loads(self.text)


class Edge:
    """A client of the edge, as the controller sees it."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"

    def request(
        self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
    ) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body=body, headers=headers or {})
            response = connection.getresponse()
            text = response.read().decode(errors="replace")
            return Answer(response.status, {key.lower(): value for key, value in response.getheaders()}, text)
        finally:
            connection.close()

    def predict(self, path: str = "/predict", data: Any = EXAMPLE, **headers: str) -> Answer:
        return self.request("POST", path, json.dumps(data).encode(), {"Content-Type": "application/json", **headers})


@pytest.fixture(scope="session")
def lab() -> dict[str, Any]:
    """What the lab tool recorded of the machine under test."""
    return json.loads((PROJECT / ".lab" / LAB_NAME / "lab.json").read_text())


@pytest.fixture(scope="session")
def edge(lab: dict[str, Any]) -> Edge:
    return Edge(lab["edge_port"])


@pytest.fixture
def engine(host) -> Callable[..., dict[str, Any]]:
    """Run a command of the rollout engine on the host; return its JSON with the exit status as `rc`."""

    def run(command: str) -> dict[str, Any]:
        result = host.run(f"appliance {command} --json")
        assert result.stdout.strip(), result.stderr
        return {**json.loads(result.stdout.strip().splitlines()[-1]), "rc": result.rc}

    return run


@pytest.fixture
def live(engine) -> str:
    """The colour that the engine calls live."""
    return engine("status")["live"]


@pytest.fixture(scope="session")
def playbook() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a playbook against the machine under test, as an operator would."""

    def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        program = Path(sys.executable).parent / "ansible-playbook"
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("ANSIBLE_", "MOLECULE_"))}
        return subprocess.run(
            [str(program), f"playbooks/{name}.yml", *arguments],
            cwd=PROJECT,
            # No bakes, as Molecule's own runs have it; a test that wants one says so.
            env={**environment, "LAB_NAME": LAB_NAME, "LAB_BAKE_SECONDS": "0"},
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )

    return run


@pytest.fixture(scope="session")
def eventually() -> Callable[..., Any]:
    """Poll a function until it returns something true; fail with its last answer after `seconds`."""

    def poll(function: Callable[[], Any], seconds: float = 60, what: str = "the condition") -> Any:
        deadline = time.monotonic() + seconds
        while True:
            try:
                value = function()
            except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
                value = None
                last: Any = error
            else:
                last = value
            if value:
                return value
            assert time.monotonic() < deadline, f"{what} was not met within {seconds} s; last: {last!r}"
            time.sleep(0.25)

    return poll


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Attach what the units said last to a failed check."""
    report = yield
    host = getattr(item, "funcargs", {}).get("host")
    if report.when == "call" and report.failed and host is not None:
        journal = host.run(
            "journalctl --no-pager -n 20 -u 'model@*' -u nginx -u docker -u mtail \
            -u 'prometheus*' -o cat"
        )
        report.sections.append(("journal of the host", journal.stdout))
    return report
