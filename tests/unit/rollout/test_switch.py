"""init, swap, rollback, verify, status, history through a front door that reads the flags as nginx does."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from rollout import audit, drain, files
from rollout.bundles import difference
from rollout.errors import Refused
from rollout_stand_ins import wait_for


def test_init_makes_the_first_colour_live_once(box):
    assert box.run("status").status == 3
    assert "run 'appliance init blue' first" in box.run("swap").message
    assert "blue is empty" in box.run("init", "blue").message
    box.deploy("blue", box.bundle())
    answer = box.run("init", "blue")
    assert (answer.status, answer.json["changed"], answer.json["state"]) == (0, True, 1)
    assert os.readlink(box.routing / "current") == "states/1"
    assert sorted(p.name for p in (box.routing / "states/1").iterdir()) == ["blue", "blue-serves", "state.json"]
    before = box.snapshot()
    for colour in ("blue", "green"):
        again = box.run("init", colour)
        assert (again.status, again.json["changed"]) == (0, False)
    assert box.snapshot() == before
    assert box.run("init", "red").status == 2


def test_a_failed_init_leaves_no_colour_live(box):
    box.deploy("blue", box.bundle())
    box.door.faults.add("blue")
    answer = box.run("init", "blue")
    assert answer.status == 1 and "no colour is live, as before" in answer.message
    assert box.state is None and not os.path.lexists(box.routing / "current")
    box.door.faults.clear()
    assert box.run("init", "blue").status == 0


def test_swap(box):
    box.live_on_blue()
    answer = box.run("swap", "--reason", "ticket 42", "--who", "bob")
    assert (answer.status, answer.json["changed"], answer.json["live"]) == (0, True, "green")
    assert 0 < answer.json["switch_ms"] < 1000 and "ms after the switch" in answer.message
    raw = json.loads((box.routing / "current/state.json").read_text())
    assert (raw["number"], raw["live"], raw["previous"], raw["who"], raw["reason"]) == (
        2,
        "green",
        "blue",
        "bob",
        "ticket 42",
    )
    assert raw["releases"] == {"blue": 1, "green": 2} and raw["since"].endswith("Z")
    # 1 + 3 requests on the connection from before, taking turns with 3 on fresh ones.
    held, one, again, two, *rest = (c for c, _ in box.door.requests[-7:])
    assert [again, rest[0], rest[2]] == [held] * 3 and len({held, one, two, rest[1]}) == 4
    entry = box.audit()[-1]
    assert (entry["live_before"], entry["live_after"], entry["state"]) == ("blue", "green", 2)
    assert entry["durations"]["switch_ms"] == answer.json["switch_ms"]
    again = box.run("swap", "--to", "green")
    assert (again.status, again.json["changed"]) == (0, False)
    assert box.audit()[-1]["outcome"] == "nothing"


def test_dry_run_changes_nothing(box):
    box.live_on_blue()
    before, lines = box.snapshot(), len(box.audit())
    answer = box.run("swap", "--dry-run")
    assert (answer.status, answer.json["changed"], answer.json["would_change"]) == (0, False, True)
    assert "would make green live: simplemodel 2.0.0, release 2" in answer.message
    box.host.running["green"].faults.add("wrong")
    assert box.run("swap", "--dry-run").status == 1
    assert (box.snapshot(), len(box.audit())) == (before, lines)


def _starting(box):
    box.host.running["green"].status = "starting"


def _degraded(box):
    box.host.running["green"].status = "degraded"


def _stopped(box):
    box.host.stop("green")


def _wrong(box):
    box.host.running["green"].faults.add("wrong")


def _other_release(box):
    box.host.running["green"].env["MODEL_RELEASE"] = "1"


def _other_bundle(box):
    box.host.running["green"].digest = "sha256:" + "0" * 64


def _one_worker(box):
    box.host.running["green"].servers[2].server_close()


def _image_gone(box):
    del box.host.images["appliance/model:1"]


def _bundle_changed(box):
    with (box.state_dir / "bundles/simplemodel/2.0.0/SHA256SUMS").open("a") as file:
        file.write("0" * 64 + "  more\n")


def _no_door(box):
    box.door.stop()


REFUSALS = {
    _starting: "green isn't ready: its status is starting",
    _degraded: "green isn't ready: its status is degraded",
    _stopped: "green doesn't answer on",
    _wrong: "response.output is 3.25 instead of 2.25",
    _other_release: "runs release 1 instead of release 2",
    _other_bundle: "serves the bundle sha256:0000",
    _one_worker: "worker 1 doesn't answer",
    _image_gone: "isn't on this host any more",
    _bundle_changed: "has changed since the release was made",
    _no_door: "doesn't answer: Connection refused; start nginx first",
}


@pytest.mark.parametrize("break_it", REFUSALS, ids=lambda f: f.__name__)
def test_a_refused_swap_changes_not_a_byte(box, break_it):
    box.live_on_blue()
    before = box.snapshot()
    break_it(box)
    answer = box.run("swap")
    assert (answer.status, answer.json["ok"], answer.json["changed"]) == (1, False, False)
    assert REFUSALS[break_it] in answer.message
    assert box.snapshot() == before
    assert box.audit()[-1]["outcome"] == "refused"


@pytest.mark.parametrize("fault", ["green", "sticky"])
def test_a_swap_that_fails_at_the_front_door_is_undone(box, fault):
    box.live_on_blue()
    box.door.faults.add(fault)
    answer = box.run("swap")
    assert (answer.status, answer.json["live"], answer.json["state"]) == (1, "blue", 3)
    assert ("502 from no colour" if fault == "green" else "held connection: 200 from blue") in answer.message
    assert "switched back to blue, which answers" in answer.message
    assert (box.state.live, box.state.number, box.state.previous) == ("blue", 3, None)
    assert "nothing to roll back to" in box.run("rollback").message
    assert box.audit()[-2]["outcome"] == "failed"
    box.door.faults.clear()
    assert box.run("swap").status == 0


def _dont_sleep(monkeypatch):
    waits = []
    monkeypatch.setattr("rollout.frontdoor.time", SimpleNamespace(monotonic=time.monotonic, sleep=waits.append))
    return waits


def test_a_colour_that_sheds_load_for_a_moment_stays_live(box, monkeypatch):
    waits = _dont_sleep(monkeypatch)
    box.live_on_blue()
    # The first request on a fresh connection is shed three times, the first on the held one once.
    box.door.sheds = [(503, "green")] * 4
    box.door.sheds[3:3] = [(200, "green")]
    answer = box.run("swap")
    assert (answer.status, answer.json["live"], answer.json["requests"]) == (0, "green", 6)
    assert waits == [0.3] * 4 and not box.door.sheds


@pytest.mark.parametrize(
    ("sheds", "waits"),
    [([(503, "green")] * 4, 3), ([(503, "blue")], 0), ([(500, "green")], 0), ([(503, "green"), (503, "blue")], 1)],
)
def test_any_other_wrong_answer_undoes_a_swap(box, monkeypatch, sheds, waits):
    slept = _dont_sleep(monkeypatch)
    box.live_on_blue()
    box.door.sheds = list(sheds)
    answer = box.run("swap")
    assert (answer.status, answer.json["live"], len(slept)) == (1, "blue", waits)
    assert "{} from {} instead of 200 from green".format(*sheds[-1]) in answer.message and not box.door.sheds


def test_a_failed_swap_keeps_what_a_rollback_returns_to(box):
    box.live_on_blue()
    box.run("swap")
    box.door.faults.add("blue")
    assert box.run("swap").status == 1
    assert (box.state.live, box.state.previous, box.state.previous_release) == ("green", "blue", 1)


def test_switching_back_works_on_a_full_disk(box, monkeypatch):
    box.live_on_blue()
    box.door.faults.add("green")
    real, directories = os.mkdir, []

    def mkdir(path, *mode):
        directories.append(path)
        if len(directories) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return real(path, *mode)

    monkeypatch.setattr(os, "mkdir", mkdir)
    answer = box.run("swap")
    assert answer.status == 1 and "switched back to blue" in answer.message
    assert len(directories) == 2 and (box.state.live, box.state.number) == ("blue", 1)


def test_a_full_disk_refuses_the_swap(box, monkeypatch):
    box.live_on_blue()
    before = box.snapshot()
    real = os.write

    def write(descriptor, data):
        if b'"live"' in bytes(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    answer = box.run("swap")
    assert answer.status == 1 and "disk is full" in answer.message and "production is as it was" in answer.message
    assert box.snapshot() == before


def test_a_check_keeps_one_worker_at_a_time_from_its_clients(box):
    box.live_on_blue()
    green, at_work, most, lock = box.host.running["green"], [], [], threading.Lock()
    predict = green.predict

    def slowly(body):
        with lock:
            at_work.append(1)
            most.append(len(at_work))
        time.sleep(0.1)
        with lock:
            at_work.pop()
        return predict(body)

    green.predict = slowly
    assert box.run("swap", "--dry-run").status == 0
    # Two examples on each of two workers.
    assert (len(most), max(most)) == (4, 1)


def test_the_first_worker_that_is_wrong_is_named(box, monkeypatch):
    box.live_on_blue()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    green = box.host.running["green"]
    green.servers[1].server_close()
    green.faults.add("wrong")
    for _ in range(3):
        assert "green worker 0 doesn't answer: Connection refused" in box.run("swap").message
    green.status = "degraded"
    box.run("swap")
    green.health = lambda real=green.health: real() | {"workers": {"wanted": 2, "ready": 1, "restarts": 0}}
    # One may be missing; what the other says counts.
    engine = box.engine()
    with pytest.raises(Refused, match="green worker 1, example 1 of 2: response.output is 3.25 instead of 2.25"):
        engine.check("green", ("degraded",))
    green.faults.clear()
    assert engine.check("green", ("degraded",))[0].number == 2


def test_a_swap_away_from_a_dead_colour_works(box):
    box.live_on_blue()
    box.host.stop("blue")
    assert box.run("status").status == 3
    assert box.run("swap").status == 0
    assert box.run("status").status == 0


def test_a_swap_tells_what_the_old_colour_still_has_to_answer(box):
    box.configure(drain_seconds=0.1)
    box.live_on_blue()
    box.host.running["blue"].in_progress = [2]
    answer = box.run("swap")
    assert answer.json["drained"]["left"] == 2 and "2 requests are still in progress on blue" in answer.message
    box.host.stop("green")
    answer = box.run("swap")
    # Nobody knows what a colour has that can't be asked.
    assert answer.status == 0 and answer.json["drained"]["left"] is None, answer.message
    assert "there is no socket" in answer.json["drained"]["note"] and answer.json["drained"]["note"] in answer.message


def test_a_deploy_tells_that_the_colour_cant_be_asked(box):
    box.live_on_blue()
    box.host.stop("green")
    answer = box.deploy("green", box.bundle("3.0.0"))
    assert answer.status == 0 and "what is still in progress on green isn't known" in answer.err


@pytest.mark.parametrize("command", ["swap", "rollback"])
@pytest.mark.parametrize("fault", ["hangs", "mute"])
def test_a_switch_away_from_a_colour_that_answers_nothing_usable_works(box, command, fault):
    box.live_on_blue()
    if command == "rollback":
        box.run("swap")
        box.run("swap")
    box.door.hangs.update({"blue"} if fault == "hangs" else ())
    box.door.faults.update({"mute"} if fault == "mute" else ())
    assert box.run(command, "--dry-run").status == 0
    answer = box.run(command)
    assert (answer.status, answer.json["live"]) == (0, "green"), answer.message
    assert "the live colour doesn't answer" in answer.err and "6 requests verified" in answer.message


def test_a_rollback_doesnt_wait_for_a_colour_that_hangs(box):
    box.configure(request_timeout_seconds=60)
    box.live_on_blue()
    box.run("swap")
    box.door.hangs.add("green")
    answer = box.run("rollback")
    assert (answer.status, answer.json["live"]) == (0, "blue") and answer.json["seconds"] < 30


@pytest.mark.parametrize("to", [[], ["--to", "1"]])
@pytest.mark.parametrize("fault", ["hangs", "fails"])
def test_a_rollback_doesnt_need_docker(box, fault, to, monkeypatch):
    box.live_on_blue()
    box.run("swap")
    if fault == "fails":
        box.host.docker_fault = (500, {"message": "no"})
        refused = box.run("swap")
        assert refused.status == 1 and "docker can't say whether the image sha256:1111" in refused.message
    else:
        over = threading.Event()
        monkeypatch.setattr(box.host, "answer", lambda *_: over.wait())
    answer = box.run("rollback", *to)
    if fault == "hangs":
        over.set()
        assert "no whole answer within 1 s" in answer.err
    assert (answer.status, answer.json["live"]) == (0, "blue"), answer.message
    assert "going on although docker can't say" in answer.err


def test_rollback_twice(box):
    box.live_on_blue()
    assert box.run("rollback").status == 1
    box.run("swap")
    first = box.run("rollback")
    assert (first.status, first.json["live"], first.json["previous"], first.json["state"]) == (0, "blue", "green", 3)
    assert "rolled back: blue is live: simplemodel 1.0.0, release 1; first answer" in first.message
    second = box.run("rollback")
    assert (second.status, second.json["live"], second.json["previous"]) == (0, "green", "blue")
    # Who pressed twice in a hurry must see what they did.
    assert "green HAD BEEN LEFT by a rollback" in second.message and "HAD BEEN" not in first.message
    # Nor is that forgotten over what changes nobody's colour.
    assert box.run("rollback").status == 0 and box.run("maintenance", "on").status == 0
    assert box.run("maintenance", "off").status == 0
    assert "green HAD BEEN LEFT by a rollback" in box.run("rollback").message


def test_what_a_rollback_left_is_told_from_what_one_failed_to_reach(box):
    box.live_on_blue()
    box.run("swap")
    box.door.faults.add("blue")
    assert "switched back to green" in box.run("rollback").message
    box.door.faults.clear()
    again = box.run("rollback")
    assert (again.status, again.json["live"]) == (0, "blue") and "HAD BEEN" not in again.message


def test_a_rollback_that_fails_on_a_full_disk_leaves_production_as_it_was(box, monkeypatch):
    box.live_on_blue()
    box.run("swap")
    box.door.faults.add("blue")

    def full(path, *_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(files, "write_new", full)
    answer = box.run("rollback")
    assert answer.status == 1 and "switched back to green" in answer.message, answer.message
    assert (box.state.live, box.state.number) == ("green", 2)


def test_rollback_refuses_what_isnt_as_it_was(box):
    box.live_on_blue()
    box.run("swap")
    before = box.snapshot()
    box.host.stop("blue")
    answer = box.run("rollback")
    assert answer.status == 1 and "can't roll back to blue: blue doesn't answer" in answer.message
    box.host.start("blue")
    images = dict(box.host.images)
    box.host.images.clear()
    assert "isn't on this host any more" in box.run("rollback").message
    box.host.images.update(images)
    box.deploy("blue", box.bundle("3.0.0"))
    refused = box.run("rollback").message
    assert "was live with release 1 and now holds release 3; 'appliance rollback --to 1'" in refused
    assert box.snapshot() == before


def test_a_rollback_to_a_degraded_colour_is_allowed(box):
    box.live_on_blue()
    box.run("swap")
    box.host.running["blue"].status = "degraded"
    assert box.run("rollback").status == 0


@pytest.fixture
def three(box):
    """Release 3 live on blue, release 2 idle on green; release 1 was on blue."""
    box.live_on_blue()
    assert box.run("swap").status == 0
    assert box.deploy("blue", box.bundle("3.0.0", 0.25)).status == 0
    assert box.run("swap").status == 0
    return box


def test_a_rollback_to_a_release_that_no_colour_holds_places_it_again(three):
    answer = three.run("rollback", "--to", "1", "--reason", "as it was")
    assert answer.status == 0, answer.message
    assert (three.state.live, three.state.previous, three.state.previous_release) == ("green", "blue", 3)
    running = three.host.running["green"]
    assert (running.version, running.env["MODEL_RELEASE"], answer.json["release"]) == ("1.0.0", "4", 4)
    first, again = (three.engine().releases.get(number) for number in (1, 4))
    assert (again.bundle_digest, again.image_id) == (first.bundle_digest, first.image_id)
    entry = three.audit()[-1]
    assert (entry["command"], entry["outcome"], entry["reason"], entry["release"]) == (
        "rollback",
        "done",
        "as it was",
        4,
    )
    assert "release 4 already" in three.run("rollback", "--to", "4").message


def test_a_rollback_to_the_idle_colours_release_only_switches(three):
    answer = three.run("rollback", "--to", "2")
    assert answer.status == 0 and (three.state.live, answer.json["release"]) == ("green", 2), answer.message
    assert sorted(path.name for path in (three.state_dir / "releases").iterdir()) == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("number", "break_it", "words"),
    [
        (1, lambda b: b.host.images.clear(), "isn't on this host"),
        (1, lambda b: b.host.faults.update({"1.0.0": {"hang"}}), "release 2 was put back and is ready"),
        (1, lambda b: b.host.faults.update({"1.0.0": {"wrong"}}), "release 2 was put back and is ready"),
        (2, lambda b: b.host.stop("green"), "green doesn't answer"),
        (2, lambda b: b.host.images.clear(), "isn't on this host"),
        (7, lambda b: None, "release 7 has no record"),
    ],
    ids=["image gone", "never ready", "other answers", "idle and down", "idle and image gone", "no such release"],
)
def test_a_rollback_to_a_release_that_isnt_well_changes_nothing(three, number, break_it, words):
    before, env = three.snapshot(), (three.config_dir / "green.env").read_bytes()
    break_it(three)
    answer = three.run("rollback", "--to", number)
    assert answer.status == 1 and words in answer.message, answer.message
    assert three.snapshot() == before and (three.config_dir / "green.env").read_bytes() == env
    assert three.host.running["blue"].version == "3.0.0"


def test_a_swap_waits_for_what_the_old_colour_still_answers(box, monkeypatch):
    monkeypatch.setattr(drain, "_POLL_SECONDS", 0.01)
    box.live_on_blue()
    box.host.running["blue"].in_progress = [3, 1, 0]
    answer = box.run("swap")
    assert (answer.status, answer.json["drained"]["left"]) == (0, 0) and "still in progress" not in answer.message
    assert "blue: requests in progress: 3" in answer.err and box.host.running["blue"].in_progress == [0]
    box.configure(drain_seconds=0.05)
    box.host.running["green"].in_progress = [2]
    answer = box.run("swap")
    assert (answer.status, answer.json["drained"]["left"], box.state.live) == (0, 2, "blue")
    assert "2 requests are still in progress on green after" in answer.message


def test_a_failed_rollback_is_undone(box):
    box.live_on_blue()
    box.run("swap")
    box.door.faults.add("blue")
    assert box.run("rollback").status == 1
    assert (box.state.live, box.state.previous) == ("green", "blue")


def test_fifty_states_are_kept(box):
    box.live_on_blue()
    engine = box.engine()
    for _ in range(60):
        engine.routing.switch(engine.routing.read())
    assert box.run("swap").status == 0
    numbers = sorted(int(p.name) for p in (box.routing / "states").iterdir())
    assert numbers == list(range(62 - 49, 63))


def test_verify(box):
    assert box.run("verify").status == 3
    box.live_on_blue()
    lines = len(box.audit())
    answer = box.run("verify")
    assert (answer.status, answer.json["ok"], answer.json["changed"]) == (0, True, False)
    assert "2 examples reproduce, 6 requests" in answer.message
    box.door.faults.add("blue")
    assert "502" in box.run("verify").message
    box.door.faults.clear()
    box.host.running["blue"].faults.add("wrong")
    assert box.run("verify").status == 3
    assert len(box.audit()) == lines


def test_status(box):
    box.live_on_blue()
    answer = box.run("status")
    assert answer.status == 0
    assert answer.message == "blue is live: simplemodel 1.0.0, release 1, ready"
    blue = answer.json["colours"]["blue"]
    assert blue == {
        "status": "ready",
        "reason": None,
        "release": 1,
        "model": "simplemodel",
        "version": "1.0.0",
        "image": "appliance/model:1",
        "bundle": f"{box.state_dir}/bundles/simplemodel/1.0.0",
        "unit": "active",
        "workers": {"wanted": 2, "ready": 2, "restarts": 0},
    }
    assert (answer.json["live"], answer.json["idle"], answer.json["previous"]) == ("blue", "green", None)
    text = box.run("status", json_output=False).out.splitlines()
    assert text[0] == answer.message and text[1].split()[:3] == ["COLOUR", "ROLE", "STATUS"]
    assert text[2].split()[:4] == ["blue", "live", "ready", "1"] and text[1].index("STATUS") == text[2].index("ready")
    box.host.running["blue"].status = "starting"
    answer = box.run("status")
    assert answer.status == 3 and not answer.json["ok"] and "\x1b" not in answer.message
    box.host.running["blue"].env["MODEL_RELEASE"] = "7"
    assert box.run("status").json["colours"]["blue"]["status"] == "mismatch"
    shutil.rmtree(box.state_dir / "releases")
    assert box.run("status").json["colours"]["blue"]["status"] == "down"
    (box.routing / "current/blue").unlink()
    answer = box.run("status")
    assert answer.status == 3 and "0 flag files" in answer.message


@pytest.mark.parametrize("target", ["states/77", "elsewhere", "../x"])
def test_a_broken_link_is_named_and_can_be_repaired(box, target):
    box.live_on_blue()
    (box.routing / "current").unlink()
    (box.routing / "current").symlink_to(target)
    for command in ("swap", "rollback"):
        answer = box.run(command)
        assert answer.status == 1 and "remove that link and run 'appliance init COLOUR'" in answer.message
    (box.routing / "current").unlink()
    assert box.run("init", "blue").json["state"] == 2


def test_history(box):
    box.live_on_blue()
    box.run("swap", "--reason", "ticket 42")
    entries = box.run("history").json["entries"]
    assert [e["command"] for e in entries] == ["deploy blue", "init blue", "deploy green", "swap"]
    assert all(e["who"] == "alice" for e in entries)
    lines = box.run("history", "-n", "2", json_output=False).out.splitlines()
    assert len(lines) == 2 and "swap" in lines[1] and "[ticket 42]" in lines[1]
    assert box.run("history", "-n", "x").status == 2


def test_a_torn_audit_line_spoils_no_other(box):
    box.live_on_blue()
    path = box.state_dir / "audit.jsonl"
    with path.open("ab") as file:
        file.write('{"time": "2026-01-31T12:00:00Z", "who": "ä'.encode()[:-1])
    assert [e["command"] for e in box.run("history").json["entries"]] == ["deploy blue", "init blue", "deploy green"]
    box.run("swap")
    assert [e["command"] for e in audit.read(path)] == ["deploy blue", "init blue", "deploy green", "swap"]
    assert path.read_bytes().endswith(b"}\n")


def test_an_audit_log_that_cant_be_written_doesnt_fail_a_swap(box):
    box.live_on_blue()
    path = box.state_dir / "audit.jsonl"
    path.unlink()
    path.mkdir()
    answer = box.run("swap")
    assert answer.status == 0 and "no line was written" in answer.json["warning"]


def test_the_lock(box):
    box.live_on_blue()
    box.door.slow = 0.3
    before = box.state.number
    first = box.popen("swap", "--who", "carol")
    wait_for(lambda: (box.root / "lock").read_text().strip())
    second = box.run("rollback", "--lock-wait", "0")
    assert (second.status, second.json["ok"]) == (4, False)
    assert f"carol (pid {first.pid}) runs 'appliance swap' since 2" in second.message
    assert box.audit()[-1]["outcome"] == "refused"
    waiting = box.run("swap", "--to", "green", "--lock-wait", "20")
    assert (waiting.status, waiting.json["changed"]) == (0, False)
    assert box.finish(first).status == 0
    assert box.state.number == before + 1
    assert (box.root / "lock").read_text() == ""


@pytest.fixture
def killed(box):
    """A swap that was killed while it held the lock."""
    box.live_on_blue()
    box.door.slow = 5
    process = box.popen("swap")
    wait_for(lambda: (box.root / "lock").read_text().strip())
    process.kill()
    process.communicate()
    box.door.slow = 0
    return process


def test_a_killed_holder_frees_the_lock(box, killed):
    assert box.run("swap", "--to", "green").status == 0


def test_unlock_of_what_a_dead_command_left(box, killed):
    assert json.loads((box.root / "lock").read_text())["pid"] == killed.pid
    answer = box.run("unlock")
    assert answer.status == 0 and f"nobody holds the lock {box.root / 'lock'}" in answer.message
    assert box.run("swap", "--to", "green").status == 0


def test_unlock_ends_a_command_that_moves_only_with_force(box):
    box.live_on_blue()
    box.door.slow = 0.5
    first = box.popen("swap", "--who", "carol")
    wait_for(lambda: box.door.live() == "green")
    answer = box.run("unlock")
    assert answer.status == 4 and f"carol (pid {first.pid}) runs 'appliance swap'" in answer.message
    assert "--force ends it now" in answer.message and first.poll() is None
    answer = box.run("unlock", "--force")
    assert answer.status == 0 and "ended with SIGTERM, so the lock is free" in answer.message
    assert box.finish(first).status == 1 and box.state.live == "blue"
    assert [(e["command"], e["outcome"]) for e in box.audit()[-2:]] == [("swap", "failed"), ("unlock", "done")]
    box.door.slow = 0
    assert box.run("swap").status == 0


def test_a_lock_held_by_an_unknown_program(box):
    with (box.root / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        answer = box.run("swap", "--lock-wait", "0.3")
    assert answer.status == 4 and "another process" in answer.message and "after waiting 0.3 s" in answer.message


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_the_middle_of_a_swap(box, number):
    box.live_on_blue()
    box.door.slow = 0.15
    process = box.popen("swap")
    wait_for(lambda: box.door.live() == "green")
    process.send_signal(number)
    answer = box.finish(process)
    entry = box.audit()[-1]
    assert entry["command"] == "swap"
    if number == signal.SIGHUP:
        # The operator's connection died: the command ends as if nothing had happened.
        assert (answer.status, box.state.live, entry["outcome"]) == (0, "green", "done")
    else:
        assert (answer.status, box.state.live, entry["outcome"]) == (1, "blue", "failed")
        assert f"interrupted by {number.name}; switched back to blue" in answer.message
    box.door.slow = 0
    assert box.run("swap").status == 0


def catches(process, number):
    """Whether a process has a handler of its own for a signal."""
    (mask,) = re.findall(r"(?m)^SigCgt:\s*(\S+)$", Path(f"/proc/{process.pid}/status").read_text())
    return int(mask, 16) >> number - 1 & 1


def test_a_signal_while_waiting_for_the_lock(box):
    box.live_on_blue()
    with (box.root / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        process = box.popen("swap", "--lock-wait", "20")
        # A command that hasn't come so far simply dies, and has nothing to tell.
        wait_for(lambda: catches(process, signal.SIGTERM))
        process.terminate()
        answer = box.finish(process)
    assert answer.status == 1 and "interrupted by SIGTERM; nothing was changed" in answer.message


def test_a_reader_that_went_away_doesnt_stop_a_swap(box):
    box.live_on_blue()
    process = box.popen("swap")
    process.stdout.close()
    process.stderr.close()
    assert process.wait(20) == 0
    assert box.state.live == "green"


def test_clients_see_no_failure_and_no_old_answer_after_a_swap(box):
    box.live_on_blue()
    import http.client

    stop, seen, faults = threading.Event(), [], []

    def client():
        connection = http.client.HTTPConnection(box.door.url.removeprefix("http://"), timeout=5)
        while not stop.is_set():
            started = time.monotonic()
            try:
                connection.request("POST", "/predict", b'{"data": [1, 2]}')
                answer = connection.getresponse()
                answer.read()
                seen.append((started, answer.status, answer.getheader("X-Model-Colour")))
            except OSError as error:
                faults.append(error)
            time.sleep(0.002)

    thread = threading.Thread(target=client)
    thread.start()
    for _ in range(3):
        assert box.run("swap").status == 0
        done, live = time.monotonic(), box.state.live
        wait_for(lambda since=done: faults or sum(started > since for started, _, _ in seen) >= 20)
        assert {colour for started, _, colour in seen if started > done} == {live}
    stop.set()
    thread.join()
    assert not faults and {status for _, status, _ in seen} == {200}


def test_root_is_needed_for_changes_only(box, monkeypatch):
    box.live_on_blue()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for command in (["swap"], ["rollback"], ["init", "blue"], ["swap", "--dry-run"]):
        answer = box.run(*command)
        assert answer.status == 5 and "run with sudo" in answer.message
    assert box.run("status").status == 0
    assert box.run("history").status == 0
    box.host.running["green"].servers[0].server_close()

    def connect(self):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("rollout.unixhttp.UnixConnection.connect", connect)
    for command in ("status", "verify"):
        answer = box.run(command)
        assert answer.status == 5 and "run with sudo" in answer.message


def test_configuration_faults(box):
    def wrong(words):
        answer = box.run("status")
        assert answer.status == 2 and words in answer.message

    box.configure(verify_requests=0)
    wrong("verify_requests must be a whole number from 1 to 1000, not 0")
    box.configure(verify_requests=3, colours=["blue"])
    wrong('colours must be a list of two different names, not ["blue"]')
    box.configure(colours=["blue", "green"], front_door="nginx")
    wrong("front_door must be a URL")
    box.configure(front_door="http://127.0.0.1", speed=1)
    wrong("unknown key speed")
    box.config.write_text("{")
    wrong("isn't valid JSON")
    box.config.unlink()
    wrong("no such file")


def test_usage(box):
    for command in ([], ["swop"], ["deploy", "blue"], ["swap", "--lock-wait", "-1"]):
        assert box.run(*command).status == 2
    for command in (["--help"], ["deploy", "--help"], ["swap", "--help"]):
        answer = box.run(*command)
        assert answer.status == 0 and "usage: appliance" in answer.out


@pytest.mark.parametrize(
    ("wanted", "got", "same"),
    [
        ({"a": [1, 2.0]}, {"a": [1.00009, 2]}, True),
        (1, 1.2, False),
        (1, True, False),
        (True, True, True),
        ("x", "x", True),
        (None, None, True),
        (None, 0, False),
        ([1], [1, 2], False),
        ({"a": 1}, {"b": 1}, False),
        (float("nan"), float("nan"), False),
        (float("inf"), float("inf"), True),
        ([], {}, False),
    ],
)
def test_comparison(wanted, got, same):
    assert (difference(wanted, got, 1e-4) is None) is same
