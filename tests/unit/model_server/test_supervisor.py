"""The parts that need no processes."""

import errno
import json
import os
import struct
from types import SimpleNamespace

import pytest
from model_server import metrics, supervisor
from model_server.logs import Log
from model_server.state import SharedState
from model_server.supervisor import Backoff, Supervisor


def test_backoff_is_immediate_then_doubles_to_a_cap_and_resets():
    backoff = Backoff()
    delays = [backoff.next_delay(1) for _ in range(2000)]
    assert delays[:8] == [0, 0.25, 0.5, 1, 2, 4, 8, 10]
    assert set(delays[8:]) == {10}
    assert backoff.next_delay(60) == 0
    assert backoff.next_delay(1) == 0.25


def log_to(path):
    return Log(os.open(path, os.O_WRONLY | os.O_CREAT))


def test_failing_fork_is_tried_again(tmp_path, monkeypatch):
    def fork():
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", fork)
    path = tmp_path / "worker-0.sock"
    path.touch()
    parent = Supervisor(SimpleNamespace(workers=1), None, None, "", log_to(tmp_path / "log"))
    slot = supervisor._Slot("worker-0", lambda: None, path=path, worker=0)
    slot.backoff.next_delay(1)
    parent._replace(slot)
    parent._replace(slot)
    assert slot.pid is None and slot.due > slot.started and not path.exists()
    monkeypatch.setattr(os, "fork", lambda: 1)
    parent._replace(slot)
    assert slot.pid == 1 and path.exists()
    events = [json.loads(line)["event"] for line in (tmp_path / "log").read_text().splitlines()]
    assert events == ["fork_failed", "fork_failed"]


def test_silent_worker_is_killed_once(tmp_path, monkeypatch):
    killed = []
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append(pid))
    parent = Supervisor(SimpleNamespace(workers=1, hang_seconds=60), None, None, "", log_to(tmp_path / "log"))
    parent._slots = [supervisor._Slot("worker-0", lambda: None, path=tmp_path, worker=0, pid=5)]
    parent._state.beat(0)
    now = supervisor.time.monotonic_ns()
    for seconds, expected in ((65, []), (71, [5]), (72, [5])):
        monkeypatch.setattr("model_server.state.time.monotonic_ns", lambda age=seconds: now + age * 10**9)
        parent._kill_hung()
        assert killed == expected


def test_process_whose_job_never_ends_is_killed_once(tmp_path, monkeypatch):
    killed = []
    monkeypatch.setattr(os, "kill", lambda pid, number: killed.append(pid))
    config = SimpleNamespace(workers=1, hang_seconds=1, jobs=SimpleNamespace(longest_seconds=60))
    parent = Supervisor(config, None, None, "", log_to(tmp_path / "log"))
    # The control process says nothing of itself.
    parent._slots = [supervisor._Slot("control", lambda: None, pid=4), supervisor._Slot("jobs", lambda: None, pid=5)]
    now = supervisor.time.monotonic_ns()
    parent._kill_hung()
    parent._state.set_job_running(True)
    for seconds, expected in ((89, []), (91, [5]), (92, [5])):
        monkeypatch.setattr("model_server.state.time.monotonic_ns", lambda age=seconds: now + age * 10**9)
        parent._kill_hung()
        assert killed == expected
    # The next one begins anew, whatever the last one died of.
    parent._state.set_job_running(True)
    monkeypatch.setattr(os, "waitpid", lambda *_, pids=[5, 0]: (pids.pop(0), 0))
    parent._metrics = SimpleNamespace(forget=lambda role: None)
    assert [slot.role for slot in parent._reap()] == ["jobs"] and parent._state.job_seconds == 0


def test_state_of_workers_is_kept_apart():
    state = SharedState(2)
    state.set_ready(1)
    state.set_busy(1, True)
    state.beat(1)
    assert state.ready == 1 and state.busy_seconds(1) > 0 and state.silent_seconds(1) > 0
    assert state.busy_seconds(0) == state.silent_seconds(0) == 0
    state.clear(1)
    assert state.ready == state.busy_seconds(1) == state.silent_seconds(1) == 0


def test_scrape_is_tried_again(monkeypatch):
    answers = [struct.error(), struct.error(), b"text"]

    def generate(_):
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(metrics, "generate_latest", generate)
    exporter = metrics.Exporter.__new__(metrics.Exporter)
    exporter._registry = None
    assert exporter.text() == b"text"


def test_long_tracebacks_are_cut(tmp_path):
    try:
        raise RuntimeError("x" * 100_000)
    except RuntimeError as error:
        log_to(tmp_path / "log").error("failed", "y" * 100_000, error)
    assert len((tmp_path / "log").read_text()) < 13_000


def test_failures_quote_nothing_unless_they_may(tmp_path):
    def parse(text):
        try:
            float(text)
        except ValueError:
            raise KeyError(text)  # noqa: B904

    log = log_to(tmp_path / "log")
    try:
        parse("+49 151")
    except KeyError as error:
        log.bind(a=1).failure("failed", "it failed", error, b=2)
        log.quoting(True).bind(a=1).failure("failed", "it failed", error)
    quiet, open_line = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert (quiet["message"], quiet["a"], quiet["b"]) == ("it failed: KeyError", 1, 2)
    # The first one raised comes first.
    first, second = quiet["traceback"].split("Traceback (most recent call last):\n")[1:]
    assert first.endswith(", in parse\nValueError\n") and second.endswith(", in parse\nKeyError\n")
    assert f'File "{__file__}", line ' in first and "float(" not in first and "+49" not in json.dumps(quiet)
    assert open_line["message"] == "it failed: KeyError: '+49 151'" and "+49" in open_line["traceback"]


def test_fork_failure_of_the_first_start_is_not_hidden(monkeypatch):
    monkeypatch.setattr(os, "fork", lambda: (_ for _ in ()).throw(OSError(errno.EAGAIN, "no")))
    parent = Supervisor(SimpleNamespace(workers=1), None, None, "", None)
    with pytest.raises(OSError, match="no"):
        parent._start(supervisor._Slot("worker-0", None, None, lambda: None))
