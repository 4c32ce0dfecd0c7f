"""The lock's heartbeat, and breaking a lock whose holder lives and doesn't move."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rollout import lock
from rollout.errors import Failed, LockHeld, Refused
from rollout_stand_ins import wait_for

SERVICE = Path(lock.__file__).resolve().parents[1]
HOLDER = """
import signal, sys
from pathlib import Path
from rollout import lock

lock._BEAT_SECONDS = 0.02
if "deaf" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
with lock.exclusive(Path(sys.argv[1]), who="carol", command="swap"):
    print("held", flush=True)
    while True:
        signal.pause()
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "lock"


@pytest.fixture
def hold(path):
    """Start a process that holds the lock."""
    started = []

    def start(*words):
        command = [sys.executable, "-c", HOLDER, str(path), *words]
        process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(SERVICE)}, stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout.readline()
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def note(path):
    return json.loads(path.read_text().splitlines()[0])


def stop(process, seconds):
    """Stop a holder, and wait until its last beat is that old."""
    process.send_signal(signal.SIGSTOP)
    time.sleep(seconds)


def test_the_note_is_renewed_until_the_lock_is_free(path, monkeypatch):
    monkeypatch.setattr(lock, "_BEAT_SECONDS", 0.01)
    with lock.exclusive(path, who="alice", command="swap"):
        first = note(path)
        assert (first["pid"], first["who"], first["beat"]) == (os.getpid(), "alice", first["since"])
        wait_for(lambda: note(path)["clock"] > first["clock"] + 0.02)
    # A beat that came too late would go to whatever file has the descriptor's number now.
    with path.with_name("other").open("w"):
        time.sleep(0.05)
    assert path.read_text() == path.with_name("other").read_text() == ""


def test_a_holder_that_moves_is_left_alone_whatever_the_clock_says(path, hold, monkeypatch):
    path.write_text("what a killed command left" * 100)
    holder = hold()
    monkeypatch.setattr(time, "time", lambda: 4e9)
    with pytest.raises(LockHeld, match=rf"carol \(pid {holder.pid}\) runs 'appliance swap' since 2.* --force ends it"):
        lock.break_stale(path)
    assert holder.poll() is None


def test_a_stopped_holder_is_ended(path, hold):
    holder = hold()
    stop(holder, 0.3)
    answer = lock.break_stale(path, seconds=0.2)
    # SIGKILL would have been needed, had it not been continued.
    assert f"carol (pid {holder.pid})" in answer and "ended with SIGTERM, so the lock is free" in answer
    assert holder.wait(5) == -signal.SIGTERM
    assert lock.break_stale(path) == f"nobody holds the lock {path}"


def test_a_holder_that_ignores_sigterm_is_killed_by_force(path, hold, monkeypatch):
    monkeypatch.setattr(lock, "_END_SECONDS", 0.2)
    holder = hold("deaf")
    assert "ended with SIGKILL" in lock.break_stale(path, force=True)
    assert holder.wait(5) == -signal.SIGKILL
    with lock.exclusive(path, who="alice", command="rollback"):
        assert note(path)["who"] == "alice"


def test_a_holder_that_hangs_in_the_kernel_is_reported(path, hold, monkeypatch):
    monkeypatch.setattr(lock, "_END_SECONDS", 0.05)
    monkeypatch.setattr(signal, "pidfd_send_signal", lambda *_: None)
    hold()
    with pytest.raises(Failed, match="doesn't end even on SIGKILL"):
        lock.break_stale(path, force=True)


def test_who_waits_learns_of_a_stuck_holder(path, hold, monkeypatch):
    monkeypatch.setattr(lock, "STALE_SECONDS", 0.2)
    stop(hold(), 0.3)
    with (
        pytest.raises(LockHeld, match=r"carol .* no sign of life from it for \d+ s: 'appliance unlock' ends it"),
        lock.exclusive(path, who="alice", command="rollback"),
    ):
        pass


def test_nobody_is_ended_for_a_note_that_isnt_the_holders(path):
    bystander = subprocess.Popen(["sleep", "30"])
    try:
        theirs = lock._Note(bystander.pid, lock._started(bystander.pid), "carol", "swap", "2", "2", 0.0)
        earlier = theirs._replace(started=theirs.started - 1)
        with path.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            for text in ("", "{}", json.dumps(earlier._asdict())):
                path.write_text(text)
                with pytest.raises(Refused, match="'lslocks' names it"):
                    lock.break_stale(path, force=True)
            # The number passes on to another process after the note was read.
            assert lock._end(earlier) == "it has ended by itself"
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_a_lock_that_nobody_holds(path):
    assert lock.break_stale(path) == f"nobody holds the lock {path}" and not path.exists()
    path.write_text("what a killed command left\n")
    assert lock.break_stale(path, force=True) == f"nobody holds the lock {path}"
