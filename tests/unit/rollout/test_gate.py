"""The gate: what is asked of Locust, what its report comes to, and that nothing of it outlives the engine's wait.

`systemd-run` and `systemctl` are stand-ins on PATH: the first starts what it is given in a session of its own, as
systemd would, the second kills that.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path

import pytest
from rollout import gate, gatesettings
from rollout.config import Config
from rollout.errors import Failed, Interrupted, Refused, UsageError
from rollout.gatesettings import Gate
from rollout.interrupts import Interrupts
from rollout.releases import Release
from rollout_stand_ins import MEASURED, serve, wait_for

SYSTEMD_RUN = """#!/bin/sh
printf '%s\\n' systemd-run "$@" >>{root}/calls
while [ "$1" != -- ]; do
  case $1 in --setenv=*) export "${{1#--setenv=}}" ;; esac
  shift
done
shift
setsid "$@" &
echo $! >{root}/pid
wait $!
status=$?
rm {root}/pid
exit $status
"""
SYSTEMCTL = """#!/bin/sh
echo "systemctl $*" >>{root}/calls
[ ! -e {root}/pid ] || kill -9 $(cat {root}/pid)
"""
NAMES = ["context.json", "load_test_evaluation.json", "load_test_report.json", "serve_image_spec.json"]
LIMITS = Gate(
    users=5,
    min_requests=100,
    min_requests_per_second=40,
    max_error_share=0.01,
    max_p50_ms=5,
    max_p95_ms=20,
    max_p99_ms=31,
)
LOCUST = shutil.which("locust", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


class Bench:
    """An appliance with one release, and a Locust that does what the test wants."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.config = Config(state_dir=root, request_timeout_seconds=1.5, gate=LIMITS)
        bundle = root / "bundles/simplemodel/1.0.0"
        bundle.mkdir(parents=True)
        (bundle / "examples.json").write_text('{"examples": [{"request": {"data": [1, 2]}, "response": {}}]}')
        self.release = Release(
            colour="green",
            name="simplemodel",
            version="1.0.0",
            bundle=str(bundle),
            bundle_digest="sha256:b",
            image="appliance/model:1",
            image_id="sha256:i",
            who="alice",
            when="2026-01-31T11:00:00Z",
            number=7,
            settings_digest="sha256:s",
        )
        self.records = root / "releases/7"
        self.records.mkdir(parents=True)
        programs = root / "bin"
        programs.mkdir()
        for name, text in (("systemd-run", SYSTEMD_RUN), ("systemctl", SYSTEMCTL)):
            self._program(programs / name, text.format(root=root))
        monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        monkeypatch.setattr(gate, "LOCUST", root / "locust")

    def _program(self, path: Path, text: str) -> None:
        path.write_text(text)
        path.chmod(0o755)

    def locust(self, text: str) -> None:
        """What Locust does, in sh."""
        self._program(self.root / "locust", f"#!/bin/sh\n{text}\n")

    def measured(self, **changes: object) -> None:
        """What Locust reports."""
        self.locust(f"cat <<'END'\n{json.dumps(MEASURED | changes)}\nEND")

    def run(self, url: str = "http://127.0.0.1:80/test/predict") -> gate.Outcome:
        return gate.run(self.config, self.release, url)

    def calls(self) -> list[str]:
        return (self.root / "calls").read_text().splitlines()

    def files(self) -> dict[str, dict]:
        return {path.name: json.loads(path.read_text()) for path in sorted(self.records.iterdir())}


@pytest.fixture
def bench(tmp_path, monkeypatch):
    return Bench(tmp_path, monkeypatch)


def test_what_is_good_enough_passes(bench):
    bench.measured()
    outcome = bench.run()
    assert (outcome.passed, outcome.reasons) == (True, [])
    assert [(check["name"], check["value"], check["limit"], check["verdict"]) for check in outcome.criteria] == [
        ("min_requests", 400, 100, "pass"),
        ("min_requests_per_second", 40.0, 40, "pass"),
        ("max_error_share", 0.0, 0.01, "pass"),
        ("max_p50_ms", 5.0, 5, "pass"),
        ("max_p95_ms", 20.0, 20, "pass"),
        ("max_p99_ms", 30.5, 31, "pass"),
    ]


def test_four_files_lie_beside_the_record(bench):
    bench.measured(failures=2, errors={"status 502": 2})
    outcome = bench.run()
    files = bench.files()
    assert list(files) == NAMES
    report = dict(MEASURED, release=7, url="http://127.0.0.1:80/test/predict", users=5, think_seconds=0.1)
    del report["locust"]
    report |= {"failures": 2, "errors": {"status 502": 2}, "requests_per_second": 40.0, "error_share": 0.005}
    assert files["load_test_report.json"] == report
    assert files["load_test_evaluation.json"] == {
        "release": 7,
        "start": "2026-01-31T12:00:00Z",
        "passed": True,
        "reasons": [],
        "criteria": outcome.criteria,
    }
    assert files["serve_image_spec.json"] == {
        "release": 7,
        "image": "appliance/model:1",
        "image_id": "sha256:i",
        "bundle": {"name": "simplemodel", "version": "1.0.0", "digest": "sha256:b"},
        "settings_digest": "sha256:s",
    }
    context = files["context.json"]
    assert (context["release"], context["who"], context["locust"]) == (7, "alice", "2.0")
    assert (context["host"], context["kernel"]) == (os.uname().nodename, os.uname().release)
    assert context["cores"] >= 1 and context["memory_bytes"] > 2**20 and context["engine_digest"].startswith("sha256:")
    bench.measured(requests=500)
    bench.run()
    assert bench.files()["load_test_report.json"]["requests"] == 500


def test_locust_runs_confined_and_for_a_limited_time(bench):
    bench.measured()
    bench.run()
    calls = bench.calls()
    assert calls[:2] == ["systemctl stop appliance-loadtest.service", "systemd-run"]
    options, command = calls[2 : calls.index("--")], calls[calls.index("--") + 1 :]
    assert {"--wait", "--collect", "--property=DynamicUser=yes", "--property=RuntimeMaxSec=42"} <= set(options)
    assert {
        "--setenv=LOADTEST_URL=http://127.0.0.1:80/test/predict",
        f"--setenv=LOADTEST_EXAMPLES={bench.release.bundle}/examples.json",
        "--setenv=LOADTEST_COLOUR=green",
    } <= set(options)
    assert command[0] == str(bench.root / "locust")
    assert {"--headless", "--users=5", "--run-time=10", "--stop-timeout=3"} <= set(command)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"duration_seconds": 10.1}, "requests a second: 39.604, at least 40"),
        (
            {"failures": 5, "errors": {"status 503": 3, "TimeoutError": 2}},
            "share of failed requests (2 × TimeoutError, 3 × status 503): 0.0125, at most 0.01",
        ),
        ({"p50_ms": 5.1}, "p50 in ms: 5.1, at most 5"),
        ({"p95_ms": 20.1}, "p95 in ms: 20.1, at most 20"),
        ({"p99_ms": 2312.5}, "p99 in ms: 2312.5, at most 31"),
    ],
)
def test_each_criterion_can_fail_the_release(bench, changes, reason):
    bench.measured(**changes)
    outcome = bench.run()
    assert (outcome.passed, outcome.reasons) == (False, [reason])
    assert [check["text"] for check in outcome.criteria if check["verdict"] == "fail"] == [reason]
    evaluation = bench.files()["load_test_evaluation.json"]
    assert (evaluation["passed"], evaluation["reasons"]) == (False, [reason])


@pytest.mark.parametrize("requests", [0, 99])
def test_too_few_requests_are_no_data_and_no_pass(bench, requests):
    about = {"requests": requests, "failures": requests, "errors": {"TimeoutError": requests} if requests else {}}
    quantiles = {} if requests else dict.fromkeys(("p50_ms", "p95_ms", "p99_ms", "max_ms"))
    bench.measured(**about, **quantiles, duration_seconds=2.5 if requests else 0.0)
    outcome = bench.run()
    assert not outcome.passed
    assert {check["verdict"] for check in outcome.criteria} == {"no data"}
    (reason,) = outcome.reasons
    assert reason.startswith(f"no data: {requests} requests in ") and "fewer than 100 say nothing" in reason
    assert "journalctl -u model@green.service" in reason
    assert ("99 × TimeoutError" in reason) == (requests == 99)


def test_without_locust_the_message_says_how_to_get_it(bench):
    with pytest.raises(Refused, match=r"Locust isn't installed.*run playbooks/site.yml"):
        bench.run()
    assert bench.files() == {} and not (bench.root / "calls").exists()


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("printf 'Traceback:\\n  no such file\\n\\n' >&2; exit 1", "without a report: no such file;"),
        (f"echo '{json.dumps(MEASURED)}'; exit 2", "exit status 2"),
        ("echo Traceback", "exit status 0"),
        ("echo '{\"requests\": 400}'", "exit status 0"),
        ("echo []", "exit status 0"),
    ],
)
def test_no_report_is_a_fault_and_leaves_nothing(bench, script, words):
    bench.locust(script)
    with pytest.raises(Failed, match=f"release 7 ended .*{words}.*journalctl -u appliance-loadtest"):
        bench.run()
    assert bench.files() == {}


def is_running(pid: int) -> bool:
    try:
        # A zombie has no command line.
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except FileNotFoundError:
        return False


def test_a_signal_ends_the_load(bench):
    bench.measured()
    bench.run()
    before = bench.files()
    bench.locust("echo $$ >$0.pid; exec sleep 60")
    mark = bench.root / "locust.pid"

    def interrupt():
        wait_for(lambda: mark.exists() and mark.read_text())
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    with Interrupts(), pytest.raises(Interrupted):
        thread.start()
        bench.run()
    thread.join()
    wait_for(lambda: not is_running(int(mark.read_text())))
    assert bench.calls()[-1] == "systemctl stop appliance-loadtest.service"
    assert bench.files() == before


def test_locust_that_hangs_is_ended(bench, monkeypatch):
    monkeypatch.setattr(gate, "_START_SECONDS", -0.7)
    bench.config = bench.config._replace(gate=Gate(seconds=0))
    bench.locust("echo $$ >$0.pid; exec sleep 60")
    with pytest.raises(Failed, match="didn't end within"):
        bench.run()
    wait_for(lambda: not is_running(int((bench.root / "locust.pid").read_text())))
    assert bench.files() == {}


def test_a_gate_is_made_of_what_the_configuration_says():
    assert gatesettings.parse("gate", {}) == Gate()
    raw = {"enabled": False, "users": 20, "seconds": 60, "max_error_share": 0.5, "max_p99_ms": 10}
    assert gatesettings.parse("gate", raw) == Gate(
        enabled=False, users=20, seconds=60, max_error_share=0.5, max_p99_ms=10
    )


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([], "x: gate must be a JSON object, not []"),
        ({"user": 1}, "x: gate: unknown key user; known are enabled, max_error_share, "),
        ({"enabled": 1}, "x: gate.enabled must be true or false, not 1"),
        ({"users": 0}, "x: gate.users must be a whole number from 1 to 1000, not 0"),
        ({"users": True}, "x: gate.users must be a whole number from 1 to 1000, not true"),
        ({"seconds": 1.5}, "x: gate.seconds must be a whole number of seconds from 1 to 3600, not 1.5"),
        ({"max_error_share": 1.1}, "x: gate.max_error_share must be a share from 0 to 1, not 1.1"),
        ({"max_p50_ms": "5"}, 'x: gate.max_p50_ms must be a number of milliseconds from 0 to 86400000, not "5"'),
        ({"max_p50_ms": float("nan")}, "x: gate.max_p50_ms must be a number of milliseconds"),
        (
            {"users": 2, "min_requests_per_second": 21},
            "x: gate.min_requests_per_second is 21, but 2 users with a pause of 0.1 s can't send more than 20 requests "
            "a second: lower it, or raise x: gate.users",
        ),
        ({"min_requests": 1001}, "can't send more than 1000 requests in 10 s"),
    ],
)
def test_a_gate_that_makes_no_sense_is_refused(raw, message):
    with pytest.raises(UsageError) as fault:
        gatesettings.parse("x: gate", raw)
    assert message in fault.value.message


class Green:
    """The idle colour: every fifth answer is an error where it is `bad`."""

    def __init__(self, bad):
        self.bad, self.bodies = bad, []

    def answer(self, handler, body):
        self.bodies.append(body)
        failed = self.bad and len(self.bodies) % 5 == 0
        handler.send(500 if failed else 200, {"output": 1}, {"X-Model-Colour": "green"})


@pytest.mark.needs("locust")
@pytest.mark.parametrize("bad", [False, True])
def test_with_the_real_locust(bench, monkeypatch, bad):
    monkeypatch.setattr(gate, "LOCUST", Path(LOCUST))
    monkeypatch.setattr(gate, "LOCUSTFILE", Path(__file__).parents[3] / "service/loadtest/locustfile.py")
    # No limits of time: a machine may stand still for a second.
    limits = Gate(
        users=4,
        seconds=1,
        min_requests=10,
        min_requests_per_second=1,
        max_p50_ms=60_000,
        max_p95_ms=60_000,
        max_p99_ms=60_000,
    )
    bench.config = bench.config._replace(gate=limits)
    green = Green(bad)
    server = serve(("127.0.0.1", 0), green)
    try:
        outcome = bench.run(f"http://127.0.0.1:{server.server_address[1]}/test/predict")
    finally:
        server.shutdown()
        server.server_close()
    report = bench.files()["load_test_report.json"]
    assert report["requests"] == len(green.bodies) > 10
    assert set(green.bodies) == {b'{"data": [1, 2]}'}
    assert 0 < report["p50_ms"] <= report["p95_ms"] <= report["p99_ms"] <= report["max_ms"]
    assert report["duration_seconds"] > 0.3
    if bad:
        assert (outcome.passed, report["errors"]) == (False, {"status 500": len(green.bodies) // 5})
        assert outcome.reasons[0].startswith("share of failed requests (")
    else:
        assert (outcome.passed, outcome.reasons, report["errors"]) == (True, [], {})
