"""A canary, a bake, and the ways out of both."""

import contextlib
import errno
import json
import os
import signal
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from rollout import config, files, host, operations, plan, watch
from rollout.errors import Failed
from rollout.frontdoor import FrontDoor
from rollout.operations import Engine
from rollout.rollouts import Rollouts
from rollout.routing import Routing
from rollout.unixhttp import Disconnected
from rollout.watch import Watch
from rollout_stand_ins import wait_for

QUICK = {
    "canary_step_seconds": 0.2,
    "bake_seconds": 0.3,
    "judge_min_requests": 10,
    "judge_patience_seconds": 10,
    "synthetic_per_second": 100,
}

WATCH = ["systemctl", "start", "--no-block", "appliance-rollout.service"]


@pytest.fixture
def rollout(box, monkeypatch):
    """Release 1 live on blue, release 2 idle on green, and everything quick."""
    monkeypatch.setattr(watch, "_TICK_SECONDS", 0.02)
    box.configure(**QUICK)
    return box.live_on_blue()


def faulty(box, fault):
    box.host.faults["3.0.0"] = {fault}
    assert box.deploy("green", box.bundle("3.0.0", 0.5)).status == 0
    return box


def carry_out(box):
    return Watch(config.load(box.config), "appliance-rollout").run()


def in_background(box):
    thread = threading.Thread(target=carry_out, args=(box,), daemon=True)
    # Only the main thread may set handlers of signals.
    running = threading.Event()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch.signal, "signal", lambda *_: running.set())
        thread.start()
        assert running.wait(60)
    return thread


def present(box):
    return plan.read(box.state_dir / "rollout.json")


def canary(box, *more):
    return box.run("swap", "--strategy", "canary", "--detach", *more)


def test_a_good_canary_goes_through_all_steps_and_its_bake(rollout):
    begun = canary(rollout)
    assert begun.status == 0 and begun.json["changed"], begun.message
    assert (rollout.state.live, rollout.state.split) == ("blue", 1)
    assert ["systemctl", "start", "--no-block", "appliance-rollout.service"] in rollout.host.calls
    carry_out(rollout)
    assert present(rollout).phase == plan.DONE, present(rollout)
    assert (rollout.state.live, rollout.state.split, rollout.state.previous) == ("green", 0, "blue")
    commands = [entry["command"] for entry in rollout.audit() if entry["outcome"] == "done"][-6:]
    assert commands == ["canary"] * 5 + ["bake"]
    stages = json.loads((rollout.state_dir / "releases/2/checks.json").read_text())["checks"]
    assert [stage["stage"] for stage in stages] == ["deploy", *(f"canary {n} %" for n in (1, 5, 25, 50)), "bake 100 %"]
    assert {check["verdict"] for stage in stages for check in stage["checks"]} == {"pass"}


@pytest.mark.parametrize(("fault", "word"), [("some-500", "errors"), ("slow", "p50")])
def test_a_canary_that_does_worse_goes_back(rollout, fault, word):
    rollout.configure(canary_step_seconds=20)
    canary(faulty(rollout, fault), "--steps", "1,100")
    carry_out(rollout)
    ended = present(rollout)
    assert ended.phase == plan.ROLLED_BACK and word in ended.reason, ended
    assert (rollout.state.live, rollout.state.split) == ("blue", 0)
    last = rollout.audit()[-1]
    assert (last["command"], last["cause"], last["live_after"]) == ("rollback", word, "blue")
    followed = rollout.run("follow")
    assert followed.status == 1 and word in followed.message and "back on blue" in followed.message


@pytest.mark.parametrize(("fault", "word"), [("some-500", "errors"), ("slow", "p50")])
def test_a_release_that_does_worse_after_the_switch_goes_back(rollout, fault, word):
    rollout.configure(bake_seconds=20)
    assert faulty(rollout, fault).run("swap").status == 0
    assert rollout.state.live == "green"
    carry_out(rollout)
    assert present(rollout).phase == plan.ROLLED_BACK and word in present(rollout).reason
    assert (rollout.state.live, rollout.state.previous) == ("blue", "green")


def test_in_a_bake_a_burst_of_slow_answers_condemns_nobody(rollout, monkeypatch):
    monkeypatch.setattr(watch, "_SETTLING_SECONDS", 1.5)
    rollout.configure(bake_seconds=20, synthetic_per_second=0)
    faulty(rollout, "slow")
    over = threading.Event()

    def client():
        asked = urllib.request.Request(f"{rollout.door.url}/predict", b'{"data": [1, 2]}', {"X-Request-ID": "client"})
        while not over.is_set():
            urllib.request.urlopen(asked, timeout=10).close()

    thread = threading.Thread(target=client, daemon=True)
    thread.start()
    try:
        wait_for(lambda: rollout.door.access_log.exists() and rollout.door.access_log.read_bytes().count(b"\n") > 50)
        assert rollout.run("swap").status == 0
        began = time.monotonic()
        carry_out(rollout)
    finally:
        over.set()
        thread.join(20)
    assert present(rollout).phase == plan.ROLLED_BACK and "p50" in present(rollout).reason
    assert time.monotonic() - began > 1.5


@pytest.mark.parametrize("strategy", ["canary", "at-once"])
def test_a_colour_that_dies_goes_back(rollout, strategy):
    rollout.configure(bake_seconds=20, canary_step_seconds=20)
    assert rollout.run("swap", "--strategy", strategy, *(["--detach"] if strategy == "canary" else [])).status == 0
    thread = in_background(rollout)
    rollout.host.stop("green")
    thread.join(10)
    assert present(rollout).phase == plan.ROLLED_BACK and "health" in present(rollout).reason
    assert (rollout.state.live, rollout.state.split) == ("blue", 0)


@pytest.mark.parametrize("strategy", ["canary", "at-once"])
def test_a_colour_that_is_dead_before_the_first_look_goes_back_at_once(rollout, strategy):
    rollout.configure(bake_seconds=20, canary_step_seconds=20, ready_timeout_seconds=60)
    assert rollout.run("swap", "--strategy", strategy, *(["--detach"] if strategy == "canary" else [])).status == 0
    rollout.host.stop("green")
    began = time.monotonic()
    carry_out(rollout)
    assert time.monotonic() - began < 30
    assert present(rollout).phase == plan.ROLLED_BACK and "health" in present(rollout).reason
    assert (rollout.state.live, rollout.state.split) == ("blue", 0)


def boot(box):
    plan.write(box.state_dir / "rollout.json", present(box)._replace(boot="the one before"))


def looked(box, check, verdict):
    """Whether the watch's last look had this verdict on a check."""
    file = box.runtime_dir / "rollout.json"
    checks = json.loads(file.read_text())["checks"] if file.exists() else []
    return any((found["name"], found["verdict"]) == (check, verdict) for found in checks)


def test_after_a_boot_a_colour_gets_the_time_to_become_ready(rollout):
    rollout.configure(ready_timeout_seconds=60, judge_patience_seconds=60)
    assert rollout.run("swap").status == 0
    boot(rollout)
    rollout.host.stop("green")
    thread = in_background(rollout)
    wait_for(lambda: looked(rollout, "health", "no data"))
    rollout.host.start("green")
    thread.join(30)
    assert present(rollout).phase == plan.DONE and rollout.state.live == "green"


def test_after_a_boot_a_colour_that_clients_get_errors_from_goes_back(rollout, monkeypatch):
    monkeypatch.setattr(watch, "_STARTING_SECONDS", 0.1)
    rollout.configure(bake_seconds=20, ready_timeout_seconds=60)
    assert rollout.run("swap").status == 0
    boot(rollout)
    rollout.host.stop("green")
    over = threading.Event()

    def client():
        asked = urllib.request.Request(f"{rollout.door.url}/predict", b'{"data": [1, 2]}', {"X-Request-ID": "client"})
        while not over.is_set():
            with contextlib.suppress(urllib.error.HTTPError):
                urllib.request.urlopen(asked, timeout=10).close()

    thread = threading.Thread(target=client, daemon=True)
    thread.start()
    began = time.monotonic()
    try:
        carry_out(rollout)
    finally:
        over.set()
        thread.join(20)
    assert time.monotonic() - began < 30
    assert present(rollout).phase == plan.ROLLED_BACK and "errors" in present(rollout).reason
    assert rollout.state.live == "blue"


def test_no_two_boots_are_alike(monkeypatch):
    assert host.boot() and host.boot() == host.boot()
    read = Path.read_text
    stat = read(Path("/proc/1/stat"))
    name, _, rest = stat.rpartition(")")
    fields = rest.split()
    fields[19] = str(int(fields[19]) + 1)
    here = host.boot()
    other = f"{name}) {' '.join(fields)}"
    monkeypatch.setattr(Path, "read_text", lambda path: other if str(path) == "/proc/1/stat" else read(path))
    assert host.boot() != here
    monkeypatch.setattr(Path, "read_text", lambda path: "")
    assert host.boot() is None


def test_the_processors_times(monkeypatch):
    read = Path.read_text
    here = host.processor()
    assert here.ran > 0 and here.stolen >= 0
    lines = "cpu  1 20 300 4000 50000 600000 7000000 80000000 9 9\ncpu0 1 1 1 1 1 1 1 1 0 0\n"
    monkeypatch.setattr(Path, "read_text", lambda path: lines if str(path) == "/proc/stat" else read(path))
    assert host.processor() == (7600321, 80000000)
    # A kernel that knows no stolen time.
    lines = "cpu  1 2 3 4 5 6 7\n"
    assert host.processor() is None
    lines = ""
    assert host.processor() is None


def test_an_old_colour_that_is_dead_itself_is_no_way_back(rollout):
    rollout.configure(bake_seconds=20)
    assert faulty(rollout, "some-500").run("swap").status == 0
    rollout.host.stop("blue")
    carry_out(rollout)
    assert rollout.state.live == "green"
    assert present(rollout).phase == plan.ABORTED and "no way back: blue is down" in present(rollout).reason
    assert "green stays live" in rollout.audit()[-1]["message"]


@pytest.mark.parametrize("fault", [None, "some-500"], ids=["no data", "errors"])
def test_a_canary_doesnt_hand_its_users_to_an_old_colour_that_is_dead(rollout, fault):
    rollout.configure(canary_step_seconds=0.5, judge_patience_seconds=0.5, bake_seconds=0)
    if fault:
        faulty(rollout, fault)
    else:
        rollout.configure(synthetic_per_second=0)
    assert canary(rollout).status == 0
    rollout.host.stop("blue")
    background = in_background(rollout)
    wait_for(lambda: "stay there: blue" in rollout.capsys.readouterr().err)
    for command in ("rollback", "abort"):
        refused = rollout.run(command)
        assert refused.status == 1 and "'appliance promote' gives it to all" in refused.message, refused.message
    assert (rollout.state.live, rollout.state.split, present(rollout).phase) == ("blue", 1, plan.CANARY)
    if fault:
        # Once the old one is back, it is the better one.
        rollout.host.start("blue")
    else:
        assert rollout.run("promote").status == 0
    background.join(30)
    assert (rollout.state.live, rollout.state.split) == ("blue" if fault else "green", 0)


def promotion_without_a_switch(box):
    """A canary at 50 % that was being promoted when its process died, and whose old colour is dead as well."""
    canary(box, "--steps", "50,100")
    begun = present(box)
    plan.write(
        box.state_dir / "rollout.json", begun._replace(phase=plan.BAKE, before=begun.state, state=begun.state + 1)
    )
    box.host.stop("blue")


def test_a_promotion_that_was_killed_keeps_its_users_where_the_old_colour_is_dead(rollout, monkeypatch):
    rollout.configure(bake_seconds=0, canary_step_seconds=20)
    promotion_without_a_switch(rollout)
    for command in ("rollback", "abort", "promote"):
        assert rollout.run(command).status == 1
    dry = rollout.run("rollback", "--dry-run")
    assert dry.status == 1 and "who would lose it" in dry.message
    monkeypatch.setenv("SERVICE_RESULT", "signal")
    settled = rollout.run("watch", "--settle")
    assert settled.status == 0 and "green (release 2) serves 50 % of users" in settled.message, settled.message
    assert (rollout.state.live, rollout.state.split, present(rollout).phase) == ("blue", 50, plan.CANARY)
    assert rollout.run("promote").status == 0
    carry_out(rollout)
    assert (rollout.state.live, rollout.state.split, present(rollout).phase) == ("green", 0, plan.DONE)


def test_a_watch_goes_on_with_a_promotion_that_was_killed(rollout):
    rollout.configure(bake_seconds=0, canary_step_seconds=0.2)
    promotion_without_a_switch(rollout)
    background = in_background(rollout)
    wait_for(lambda: present(rollout).phase == plan.CANARY)
    rollout.host.start("blue")
    background.join(30)
    assert (rollout.state.live, present(rollout).phase) == ("green", plan.DONE)


def test_a_promotion_that_neither_happens_nor_is_undone_isnt_taken_for_live(rollout, monkeypatch):
    rollout.configure(bake_seconds=0, canary_step_seconds=20)
    monkeypatch.setattr(watch, "_AGAIN_SECONDS", 0.1)
    canary(rollout, "--steps", "50,100")
    rollout.host.stop("blue")

    def full_disk(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Routing, "switch", full_disk)
        patch.setattr(Rollouts, "_fall_back", lambda *_: None)
        background = in_background(rollout)
        assert rollout.run("promote").status == 0
        wait_for(lambda: any(entry["outcome"] == "failed" for entry in rollout.audit()))
    wait_for(lambda: present(rollout).phase == plan.CANARY)
    assert rollout.state.split == 50
    assert rollout.run("promote").status == 0
    background.join(30)
    assert (rollout.state.live, present(rollout).phase) == ("green", plan.DONE)
    engine = rollout.engine()
    plan.write(
        rollout.state_dir / "rollout.json",
        present(rollout)._replace(phase=plan.BAKE, target="blue", before=rollout.state.number, state=99),
    )
    refused = engine.run("bake", lambda: Rollouts(engine).advance(present(rollout).number))
    assert refused.exit_status == 1 and "isn't live yet" in refused.message


def test_a_swap_that_was_killed_leaves_a_share_by_hand_where_the_old_colour_is_dead(rollout):
    rollout.configure(bake_seconds=20)
    rollout.run("split", "25")
    rollout.host.stop("blue")
    killed_before_its_switch(rollout)
    # Whatever else was changed meanwhile.
    plan.write(rollout.state_dir / "rollout.json", present(rollout)._replace(before=rollout.state.number))
    told = carry_out(rollout).message
    assert told.endswith("who would lose it: 'appliance swap' gives it to all"), told
    assert (rollout.state.live, rollout.state.split, present(rollout).phase) == ("blue", 25, plan.ABORTED)


def test_a_watch_that_is_stopped_where_there_is_no_way_back_is_started_again_by_resume(rollout, monkeypatch):
    rollout.configure(canary_step_seconds=20)
    canary(rollout)
    rollout.host.stop("blue")
    timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), watch.signal.SIGTERM))
    timer.start()
    assert carry_out(rollout).exit_status == 1
    monkeypatch.setenv("SERVICE_RESULT", "exit-code")
    before = len(rollout.host.calls)
    assert rollout.run("watch", "--settle").status == 1
    assert WATCH not in rollout.host.calls[before:] and rollout.state.split == 1
    assert rollout.run("resume").status == 0
    assert WATCH in rollout.host.calls[before:]


def test_a_share_on_a_degraded_colour_goes_live_once_it_is_ready(rollout):
    rollout.run("split", "25")
    rollout.host.stop("blue")
    rollout.host.running["green"].status = "degraded"
    for arguments in (["rollback"], ["rollback", "--dry-run"]):
        refused = rollout.run(*arguments)
        assert refused.status == 1 and refused.message.endswith("gives it to all once it is ready"), refused.message


@pytest.mark.parametrize("begin", ["canary", "bake"])
def test_an_old_colour_whose_release_wasnt_known_is_a_way_back(rollout, begin):
    faulty(rollout, "some-500")
    rollout.configure(canary_step_seconds=20, bake_seconds=20)
    if begin == "canary":
        canary(rollout, "--steps", "50,100")
    else:
        assert rollout.run("swap").status == 0
    plan.write(rollout.state_dir / "rollout.json", present(rollout)._replace(source_release=None))
    carry_out(rollout)
    assert (rollout.state.live, rollout.state.split, present(rollout).phase) == ("blue", 0, plan.ROLLED_BACK)


def test_without_data_it_waits_and_then_goes_back(rollout):
    rollout.configure(synthetic_per_second=0, judge_patience_seconds=0.5)
    canary(rollout)
    started = time.monotonic()
    carry_out(rollout)
    assert time.monotonic() - started > 0.6
    assert present(rollout).phase == plan.ROLLED_BACK and "nothing could be said" in present(rollout).reason
    assert rollout.audit()[-1]["cause"] == "no data"


def test_a_bake_without_data_stays_live_unjudged(rollout):
    rollout.configure(synthetic_per_second=0, judge_patience_seconds=0.5)
    assert rollout.run("swap").status == 0
    carry_out(rollout)
    ended = present(rollout)
    assert (ended.phase, ended.cause, ended.percent, rollout.state.live) == (plan.UNJUDGED, None, 100, "green")
    for word in ("errors: 0 requests of the 10", "access.log is written", "disk is full"):
        assert word in ended.reason, ended.reason
    followed = rollout.run("follow")
    assert followed.status == 1 and followed.json["ended"] and "unjudged" in followed.message
    assert followed.message.endswith("green is live")
    last = rollout.audit()[-1]
    assert (last["command"], last["outcome"], last["cause"], last["live_after"]) == ("bake", "unjudged", None, "green")
    metrics = (rollout.root / "appliance.prom").read_text()
    assert 'appliance_rollout_phase{phase="unjudged"} 1.0' in metrics
    assert 'appliance_rollbacks_total{reason="by hand"} 0.0' in metrics and 'reason="no data"' not in metrics
    # It bars neither the way back nor the way to it again.
    for colour in ("blue", "green"):
        answer = rollout.run("rollback")
        assert answer.status == 0 and rollout.state.live == colour, answer.message


def test_a_bake_without_data_whose_colour_isnt_well_goes_back(rollout):
    rollout.configure(synthetic_per_second=0, judge_patience_seconds=0.3, ready_timeout_seconds=60)
    assert rollout.run("swap").status == 0
    boot(rollout)
    rollout.host.stop("green")
    carry_out(rollout)
    assert present(rollout).phase == plan.ROLLED_BACK and rollout.state.live == "blue"
    assert rollout.audit()[-1]["cause"] == "no data"


@pytest.mark.parametrize("strategy", ["canary", "at-once"])
def test_few_requests_say_something_after_a_while(rollout, strategy):
    """The window holds too few of them at any time, and nobody but clients sends any."""
    rollout.configure(
        synthetic_per_second=0,
        judge_window_seconds=0.2,
        judge_patience_seconds=30,
        canary_step_seconds=2,
        bake_seconds=2,
    )
    over = threading.Event()

    def client():
        for number in range(10000):
            asked = urllib.request.Request(
                f"{rollout.door.url}/predict", b'{"data": [1, 2]}', {"X-Request-ID": f"client-{number}"}
            )
            urllib.request.urlopen(asked, timeout=10).close()
            if over.wait(0.06):
                return

    thread = threading.Thread(target=client, daemon=True)
    thread.start()
    try:
        wait_for(lambda: rollout.door.access_log.read_bytes().count(b"\n") > 20)
        more = ["--strategy", "canary", "--detach", "--steps", "50,100"] if strategy == "canary" else []
        assert rollout.run("swap", *more).status == 0
        carry_out(rollout)
    finally:
        over.set()
        thread.join(20)
    assert present(rollout).phase == plan.DONE, present(rollout)


def test_a_paused_canary_stays_and_is_judged(rollout):
    canary(rollout)
    assert rollout.run("pause").json["changed"] and not rollout.run("pause").json["changed"]
    thread = in_background(rollout)
    file = rollout.runtime_dir / "rollout.json"
    wait_for(lambda: file.exists() and json.loads(file.read_text())["verdict"] == "pass")
    # So many looks take longer than the step.
    looks = set()
    wait_for(lambda: looks.add(file.stat().st_mtime_ns) or len(looks) > QUICK["canary_step_seconds"] / 0.02)
    assert rollout.state.split == 1
    report = json.loads(file.read_text())
    assert "paused" in report["text"] and report["checks"]
    assert "paused" in rollout.run("status").message
    rollout.run("resume")
    thread.join(10)
    assert present(rollout).phase == plan.DONE


def test_the_metrics_follow_the_verdicts_of_a_paused_canary(rollout, monkeypatch):
    monkeypatch.setattr(watch, "_METRICS_SECONDS", 1000)
    rollout.configure(judge_failures=100)
    canary(rollout)
    metrics = rollout.root / "appliance.prom"
    rollout.run("pause")
    thread = in_background(rollout)

    def shows(verdict):
        return f'appliance_verdict{{check="errors",verdict="{verdict}"}} 1.0' in metrics.read_text()

    wait_for(lambda: shows("pass"))
    rollout.door.faults.add("green")
    wait_for(lambda: shows("fail"))
    assert present(rollout).paused
    assert rollout.run("abort").status == 0
    thread.join(20)


def test_the_metrics_are_never_old(rollout, monkeypatch):
    monkeypatch.setattr(watch, "_METRICS_SECONDS", 0.1)
    rollout.configure(synthetic_per_second=0)
    canary(rollout)
    rollout.run("pause")
    thread = in_background(rollout)
    file, seen = rollout.root / "appliance.prom", set()
    wait_for(lambda: seen.add(file.stat().st_mtime_ns) or len(seen) > 5)
    rollout.run("abort")
    thread.join(20)


def test_promote_ends_a_canary_and_then_its_bake(rollout):
    rollout.configure(bake_seconds=20, canary_step_seconds=20)
    canary(rollout)
    thread = in_background(rollout)
    rollout.run("promote")
    wait_for(lambda: rollout.state.live == "green")
    wait_for(lambda: present(rollout).asked is None)
    assert present(rollout).phase == plan.BAKE
    assert rollout.run("promote").status == 0
    thread.join(10)
    assert present(rollout).phase == plan.DONE and rollout.state.live == "green"


@pytest.mark.parametrize("command", ["abort", "rollback"])
@pytest.mark.parametrize("strategy", ["canary", "at-once"])
def test_a_hand_can_end_it(rollout, command, strategy):
    rollout.configure(bake_seconds=20, canary_step_seconds=20)
    rollout.run("swap", "--strategy", strategy, *(["--detach"] if strategy == "canary" else []))
    thread = in_background(rollout)
    answer = rollout.run(command, "--reason", "looks odd")
    assert answer.status == 0 and answer.json["changed"], answer.message
    thread.join(10)
    assert not thread.is_alive()
    assert (rollout.state.live, rollout.state.split) == ("blue", 0)
    ended = present(rollout)
    assert ended.phase == (plan.ABORTED if command == "abort" else plan.ROLLED_BACK) and ended.reason == "looks odd"
    assert answer.json["switch_ms"] > 0 and f"first answer {answer.json['switch_ms']:g} ms" in answer.message
    done = [entry for entry in rollout.audit() if entry["command"] == command][-1]
    assert done["durations"]["switch_ms"] == answer.json["switch_ms"] and done["switched_at"] <= time.time()


@pytest.mark.parametrize("command", ["abort", "rollback"])
def test_traffic_that_is_back_on_a_colour_that_doesnt_answer_is_no_success(rollout, command):
    rollout.configure(bake_seconds=20, canary_step_seconds=20)
    canary(rollout)
    rollout.door.faults.add("blue")
    answer = rollout.run(command)
    assert (answer.status, answer.json["ok"], answer.json["changed"]) == (3, False, True)
    assert "WHICH DOESN'T ANSWER" in answer.message and answer.json["switch_ms"] is None
    assert rollout.state.split == 0 and not present(rollout).under_way


@pytest.mark.parametrize("how", ["abort", "rollback", "watch"])
def test_a_rollback_doesnt_bring_back_what_a_rollout_took_back(rollout, how):
    rollout.configure(bake_seconds=20)
    faulty(rollout, "some-500").run("swap", "--reason", "looks good")
    if how == "watch":
        carry_out(rollout)
    else:
        assert rollout.run(how).status == 0
    before = rollout.snapshot()
    for more in ([], ["--dry-run"]):
        answer = rollout.run("rollback", *more)
        assert answer.status == 1 and "can't roll back to green" in answer.message, answer.message
        assert present(rollout).reason in answer.message and "--to 3" in answer.message
    assert rollout.snapshot() == before
    rollout.host.running["green"].faults.clear()
    assert rollout.run("rollback", "--to", "3").status == 0 and rollout.state.live == "green"
    # From there the way back is open.
    assert rollout.run("rollback").status == 0 and rollout.state.live == "blue"


def test_a_rollback_isnt_refused_for_a_switch_that_never_happened(rollout):
    rollout.configure(bake_seconds=0)
    rollout.run("swap")
    rollout.configure(bake_seconds=20)
    rollout.door.faults.add("blue")
    assert rollout.run("swap").status == 1 and present(rollout).phase == plan.ABORTED
    rollout.door.faults.clear()
    answer = rollout.run("rollback")
    assert answer.status == 0 and rollout.state.live == "blue", answer.message


def killed_before_its_switch(box):
    """A swap whose process dies when its plan is on record and nothing has moved yet."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "switch", lambda *_: (_ for _ in ()).throw(SystemExit("killed")))
        patch.setattr(Rollouts, "_fall_back", lambda *_: None)
        with pytest.raises(SystemExit):
            Rollouts(box.engine()).swap()
    assert present(box).phase == plan.BAKE and box.state.live == "blue"


@pytest.mark.parametrize("ends", ["killed", "settled", "failed"])
def test_a_swap_that_never_happened_doesnt_open_the_way_to_what_was_taken_back(rollout, ends):
    rollout.configure(bake_seconds=20)
    faulty(rollout, "some-500").run("swap")
    carry_out(rollout)
    why = present(rollout).reason
    # Nothing but what is on record tells that it was bad.
    rollout.host.running["green"].faults.clear()
    assert rollout.run("rollback").status == 1
    # Twice: what is known of the first rollout outlasts any number of such swaps.
    for _ in range(2):
        if ends == "failed":
            rollout.door.faults.add("green")
            assert rollout.run("swap").status == 1
            rollout.door.faults.clear()
        else:
            killed_before_its_switch(rollout)
        if ends == "settled":
            assert rollout.run("watch", "--settle").status == 0
        before = rollout.snapshot()
        for more in ([], ["--dry-run"]):
            answer = rollout.run("rollback", *more)
            assert answer.status == 1 and "can't roll back to green" in answer.message, answer.message
            assert why in answer.message and "--to 3" in answer.message
        assert rollout.snapshot() == before and rollout.state.live == "blue"


def test_a_rollback_while_a_swap_hangs_before_its_switch_goes_to_what_served_well(rollout):
    rollout.configure(bake_seconds=0)
    rollout.run("swap")
    rollout.run("swap")
    rollout.configure(bake_seconds=20)
    killed_before_its_switch(rollout)
    answer = rollout.run("rollback")
    assert answer.status == 0 and rollout.state.live == "green", answer.message
    # It isn't traffic that went back, and nobody watches a rollback.
    assert present(rollout).phase == plan.SUPERSEDED and not present(rollout).went_back
    assert Rollouts(rollout.engine()).under_way() is None


@pytest.mark.parametrize("how", [["watch", "--settle"], ["watch"], ["abort"]], ids=["settle", "watch", "abort"])
def test_a_switch_that_never_happened_is_no_traffic_that_went_back(rollout, how):
    rollout.configure(bake_seconds=0)
    rollout.run("swap")
    rollout.run("swap")
    rollout.configure(bake_seconds=20)
    killed_before_its_switch(rollout)
    answer = rollout.run(*how)
    assert answer.status == 0 and "all traffic is still on blue" in answer.message, answer.message
    ended = present(rollout)
    assert (ended.phase, ended.cause, ended.went_back) == (plan.ABORTED, None, False)
    assert rollout.audit()[-1]["cause"] is None
    metrics = (rollout.root / "appliance.prom").read_text()
    assert 'reason="unwatched"' not in metrics and 'appliance_rollbacks_total{reason="by hand"} 0.0' in metrics
    assert "back on" not in rollout.run("follow").message
    # The way out in an emergency is open.
    answer = rollout.run("rollback")
    assert answer.status == 0 and rollout.state.live == "green", answer.message


def test_a_rollback_after_a_promotion_that_was_killed_sends_everybody_back(rollout):
    rollout.configure(bake_seconds=20, canary_step_seconds=20)
    canary(rollout, "--steps", "50,100")
    begun = present(rollout)
    unswitched = begun._replace(phase=plan.BAKE, before=begun.state, state=begun.state + 1)
    plan.write(rollout.state_dir / "rollout.json", unswitched)
    told = rollout.run("rollback", "--dry-run")
    assert told.status == 0 and "would send everybody back to blue" in told.message
    assert rollout.run("rollback").status == 0
    assert (rollout.state.live, rollout.state.split) == ("blue", 0)
    assert present(rollout).phase == plan.ROLLED_BACK and present(rollout).went_back


def test_a_plan_of_an_older_engine_can_be_read(rollout):
    rollout.configure(bake_seconds=20)
    rollout.run("swap")
    path = rollout.state_dir / "rollout.json"
    raw = {key: value for key, value in json.loads(path.read_text()).items() if key not in ("boot", "cause", "earlier")}
    path.write_text(json.dumps(raw))
    assert Rollouts(rollout.engine()).under_way() is not None
    plan.write(path, present(rollout)._replace(phase=plan.ROLLED_BACK))
    assert present(rollout).went_back


def test_an_abort_doesnt_wait_for_a_new_colour_that_hangs(rollout):
    rollout.configure(bake_seconds=20, request_timeout_seconds=60)
    rollout.run("swap")
    over = threading.Event()
    rollout.host.running["green"].health = over.wait
    began = time.monotonic()
    answer = rollout.run("abort")
    assert time.monotonic() - began < 30
    over.set()
    assert answer.status == 0 and rollout.state.live == "blue"


def test_a_swap_by_hand_ends_the_bake_of_the_one_before(rollout):
    rollout.configure(bake_seconds=20)
    # What tells swap.yml that there is something to follow.
    assert rollout.run("swap").json["rollout"] == present(rollout).number
    thread = in_background(rollout)
    # The watch takes a first look under the lock.
    assert rollout.run("swap", "--lock-wait", "20").status == 0
    assert rollout.state.live == "blue" and present(rollout).target == "blue"
    rollout.run("promote")
    thread.join(10)
    assert present(rollout).phase == plan.DONE and rollout.state.live == "blue"


def test_nothing_else_gets_in_the_way_of_a_canary(rollout):
    rollout.configure(canary_step_seconds=20)
    canary(rollout)
    for command in (["swap"], ["split", "10"], ["swap", "--strategy", "canary"]):
        answer = rollout.run(*command)
        assert answer.status == 1 and "a rollout is under way" in answer.message and "abort" in answer.message
    answer = rollout.deploy("green", rollout.bundle("3.0.0"))
    assert answer.status == 0 and answer.json["pending"] and "under way" in answer.message
    assert rollout.state.split == 1 and rollout.host.running["green"].version == "2.0.0"


def test_status_tells_the_share_that_users_have(rollout):
    """A command was killed between the plan and the routing."""
    rollout.configure(bake_seconds=20, canary_step_seconds=20)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rollouts, "set_split", lambda *_: (_ for _ in ()).throw(SystemExit("killed")))
        patch.setattr(Rollouts, "end", lambda *_: None)
        with pytest.raises(SystemExit):
            Rollouts(rollout.engine()).canary(None)
    assert present(rollout).percent == 1 and rollout.state.split == 0
    status = rollout.run("status")
    assert "green (release 2) serves 0 % of users" in status.message
    assert status.json["rollout"]["percent"] == 0 and "0 %" in status.json["rollout"]["text"]
    begun = present(rollout)
    plan.write(rollout.state_dir / "rollout.json", begun._replace(phase=plan.BAKE))
    status = rollout.run("status")
    assert "green (release 2) isn't live yet" in status.message and status.json["rollout"]["percent"] == 0


def test_who_stops_looking_on_is_told_that_it_goes_on(rollout):
    rollout.configure(canary_step_seconds=20)
    process = rollout.popen("swap", "--strategy", "canary")
    # What `follow` shows first.
    next(line for line in process.stderr if line.startswith("appliance: canary: green"))
    process.send_signal(signal.SIGINT)
    answer = rollout.finish(process)
    assert (answer.status, answer.json["changed"], rollout.state.split) == (1, True, 1)
    assert "it goes on" in answer.message and "'appliance abort'" in answer.message
    assert rollout.run("abort").status == 0


def test_an_interrupt_while_a_rollout_is_put_on_record_leaves_none(rollout, monkeypatch):
    rollout.configure(bake_seconds=20)
    before, real = rollout.snapshot(), files.fsync_directory

    def interrupted(path):
        real(path)
        if path == rollout.state_dir and present(rollout).under_way:
            os.kill(os.getpid(), watch.signal.SIGINT)

    monkeypatch.setattr(files, "fsync_directory", interrupted)
    answer = rollout.run("swap")
    assert answer.status == 1 and answer.message == "interrupted by SIGINT; nothing was changed"
    assert present(rollout).phase == plan.ABORTED and rollout.snapshot() == before


def test_a_rollout_that_is_put_on_record_while_the_last_watch_ends_gets_another(rollout, monkeypatch):
    real, before = operations.exclusive, len(rollout.host.calls)

    def in_turn(*arguments, **options):
        # Whoever has the lock has started the unit in vain, for it hadn't ended yet, and writes the plan now.
        monkeypatch.setattr(operations, "exclusive", real)
        assert canary(rollout).status == 0
        return real(*arguments, **options)

    monkeypatch.setattr(operations, "exclusive", in_turn)
    monkeypatch.setenv("SERVICE_RESULT", "success")
    answer = rollout.run("watch", "--settle")
    assert (answer.status, answer.message) == (0, "the next rollout is under way")
    assert rollout.host.calls[before:].count(["systemctl", "start", "--no-block", "appliance-rollout.service"]) == 2
    assert rollout.state.split == 1


def test_no_message_calls_a_colour_live_that_isnt(rollout):
    rollout.configure(bake_seconds=20)
    killed_before_its_switch(rollout)
    said = "bake: green (release 2) isn't live yet, and serves 0 % of users"
    answers = [
        rollout.deploy("green", rollout.bundle("3.0.0")),
        canary(rollout),
        rollout.run("split", "5"),
        rollout.run("rollback", "--to", "1"),
        rollout.run("pause"),
        rollout.run("follow", "--seconds", "0"),
    ]
    for answer in answers:
        assert said in answer.message, answer.message
    assert answers[-1].json["rollout"]["text"] == said and answers[-1].json["rollout"]["percent"] == 0
    # There is nothing to promote; whoever watches ends it.
    before = len(rollout.host.calls)
    answer = rollout.run("promote")
    assert answer.status == 1 and said in answer.message and "promote or swap again" in answer.message
    assert ["systemctl", "start", "--no-block", "appliance-rollout.service"] in rollout.host.calls[before:]
    assert said in rollout.run("watch", "--settle").err


def test_orders_without_a_rollout_are_refused(rollout):
    for command in ("pause", "resume", "promote", "abort"):
        answer = rollout.run(command)
        assert answer.status == 1 and "no rollout is under way" in answer.message


def test_a_dry_run_of_a_canary_changes_nothing(rollout):
    before = rollout.snapshot()
    answer = rollout.run("swap", "--strategy", "canary", "--dry-run")
    assert answer.status == 0 and answer.json["would_change"] and "1 %, 5 %" in answer.message
    assert rollout.snapshot() == before and present(rollout) is None


@pytest.mark.parametrize("strategy", ["canary", "at-once"])
@pytest.mark.parametrize("how", ["signal", "core-dump", None], ids=["killed", "crashed", "after a boot"])
def test_a_rollout_that_nobody_watches_goes_back(rollout, monkeypatch, strategy, how):
    rollout.configure(bake_seconds=20)
    rollout.run("swap", "--strategy", strategy, *(["--detach"] if strategy == "canary" else []))
    if how:
        monkeypatch.setenv("SERVICE_RESULT", how)
    answer = rollout.run("watch", "--settle")
    assert answer.status == 0, answer.message
    assert (rollout.state.live, rollout.state.split) == ("blue", 0)
    assert present(rollout).phase == plan.ROLLED_BACK and rollout.audit()[-1]["cause"] == "unwatched"
    assert not rollout.run("watch", "--settle").json["changed"]


def test_a_rollout_that_began_while_the_last_watch_ended_gets_another(rollout, monkeypatch):
    canary(rollout)
    monkeypatch.setenv("SERVICE_RESULT", "success")
    before = len(rollout.host.calls)
    rollout.run("watch", "--settle")
    assert ["systemctl", "start", "--no-block", "appliance-rollout.service"] in rollout.host.calls[before:]
    assert rollout.state.split == 1


def test_a_promotion_that_was_killed_before_its_switch_is_settled_on_record(rollout):
    rollout.configure(bake_seconds=20, canary_step_seconds=20)
    canary(rollout, "--steps", "50,100")
    begun = present(rollout)
    plan.write(
        rollout.state_dir / "rollout.json",
        begun._replace(phase=plan.BAKE, before=begun.state, state=begun.state + 1),
    )
    carry_out(rollout)
    assert present(rollout).phase == plan.ROLLED_BACK and (rollout.state.live, rollout.state.split) == ("blue", 0)
    last = rollout.audit()[-1]
    assert (last["command"], last["cause"], last["outcome"]) == ("rollback", "unwatched", "done")
    metrics = (rollout.root / "appliance.prom").read_text()
    assert 'appliance_rollbacks_total{reason="unwatched"} 1.0' in metrics and "appliance_split_percent 0.0" in metrics


def test_sigterm_sends_traffic_back_first(rollout):
    rollout.configure(canary_step_seconds=20)
    canary(rollout)
    timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), watch.signal.SIGTERM))
    timer.start()
    carry_out(rollout)
    assert present(rollout).phase == plan.ROLLED_BACK and rollout.state.split == 0


def test_a_switch_that_fails_leaves_no_rollout(rollout):
    rollout.door.faults.add("green")
    answer = rollout.run("swap")
    assert answer.status == 1 and rollout.state.live == "blue"
    assert not present(rollout).under_way
    assert Rollouts(rollout.engine()).under_way() is None


@pytest.fixture
def full(rollout, monkeypatch):
    """While it is set, no plan of these phases can be written: the disk is full."""
    phases, write = set(), plan.write

    def full_disk(path, wanted):
        if wanted.phase in phases:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(path, wanted)

    monkeypatch.setattr(plan, "write", full_disk)
    return phases


def test_a_rollback_in_a_bake_that_isnt_recorded_has_happened(rollout, full):
    rollout.configure(bake_seconds=20)
    rollout.run("swap")
    full.add(plan.ROLLED_BACK)
    answer = rollout.run("rollback")
    assert (answer.status, answer.json["changed"], rollout.state.live) == (0, True, "blue"), answer.message
    assert "isn't recorded" in answer.message and "disk is full" in answer.message
    assert Rollouts(rollout.engine()).under_way() is None


@pytest.mark.parametrize("strategy", ["canary", "at-once"])
@pytest.mark.parametrize("what", ["the plan", "any file"])
def test_on_a_full_disk_what_went_back_stays_back(rollout, monkeypatch, strategy, what):
    rollout.configure(bake_seconds=20, canary_step_seconds=20)
    faulty(rollout, "some-500").run("swap", "--strategy", strategy, *(["--detach"] if strategy == "canary" else []))

    def full_disk(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Routing, "switch", full_disk)
        patch.setattr(*((plan, "write") if what == "the plan" else (files, "replace")), full_disk)
        carry_out(rollout)
        assert (rollout.state.live, rollout.state.split) == ("blue", 0)
    # There is space again, and the colour does well, so that nothing but what is on record keeps it back.
    rollout.host.running["green"].faults.clear()
    rollout.configure(bake_seconds=0.3, canary_step_seconds=0.2)
    for command in (["watch"], ["watch", "--settle"]):
        assert rollout.run(*command).message == "no rollout is under way"
    assert (rollout.state.live, rollout.state.split) == ("blue", 0)
    ended = present(rollout)
    assert (ended.phase, ended.cause, ended.went_back) == (plan.ROLLED_BACK, "errors", True)
    followed = rollout.run("follow")
    assert followed.status == 1 and "errors" in followed.message and "back on blue" in followed.message
    # Whatever made it live once: the way back leads to no release that went back.
    routing = rollout.engine().routing
    routing.switch(rollout.state._replace(previous="green", previous_release=3))
    answer = rollout.run("rollback")
    assert answer.status == 1 and "can't roll back to green" in answer.message and "errors" in answer.message
    # The next rollout has a number of its own, and leaves nothing of this one.
    assert canary(rollout).status == 0 and present(rollout).number == ended.number + 1
    assert present(rollout).earlier == ended.describe()
    assert [path.name for path in rollout.state_dir.glob("rollout.json*")] == ["rollout.json"]


@pytest.mark.parametrize("strategy", ["canary", "at-once"])
def test_on_a_full_disk_the_way_back_keeps_maintenance_and_shadow(rollout, monkeypatch, strategy):
    rollout.configure(bake_seconds=20, canary_step_seconds=20)
    rollout.run("swap", "--strategy", strategy, *(["--detach"] if strategy == "canary" else []))
    for change in (["maintenance", "on"], ["shadow", "20"], ["maintenance", "off"], ["maintenance", "on"]):
        assert rollout.run(*change).status == 0
    assert Rollouts(rollout.engine()).under_way() is not None

    def full_disk(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Routing, "switch", full_disk)
    assert rollout.run("abort").status == 0
    state = rollout.state
    assert (state.live, state.split, state.shadow, state.maintenance) == ("blue", 0, 20, True)


@pytest.mark.parametrize("share", [None, "25"], ids=["after a swap", "a share by hand"])
def test_on_a_full_disk_a_rollback_by_hand_goes_back(rollout, monkeypatch, share):
    rollout.configure(bake_seconds=0)
    assert rollout.run(*(["split", share] if share else ["swap"])).status == 0

    def full_disk(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Routing, "switch", full_disk)
    answer = rollout.run("rollback")
    assert (answer.status, answer.json["live"]) == (0, "blue"), answer.message
    assert (rollout.state.live, rollout.state.split) == ("blue", 0)


def test_a_rollback_ends_a_share_by_hand(rollout):
    """Whatever the colour that has it was before: its users are those that the person wants back."""
    rollout.run("split", "25")
    assert "send everybody back to blue" in rollout.run("rollback", "--dry-run").message
    assert rollout.state.split == 25
    answer = rollout.run("rollback")
    assert (answer.status, rollout.state.live, rollout.state.split) == (0, "blue", 0), answer.message
    assert "everybody is on blue again; first answer" in answer.message and "goes back from" not in answer.message
    assert rollout.audit()[-1]["durations"]["switch_ms"] > 0
    # It isn't a switch: that is still to be had, from where there is one.
    assert "nothing to roll back to" in rollout.run("rollback").message
    rollout.configure(bake_seconds=0)
    rollout.run("swap")
    rollout.run("split", "5")
    ended = rollout.run("rollback")
    assert ended.status == 0 and rollout.state.live == "green" and "goes back from green" in ended.message
    answer = rollout.run("rollback")
    assert answer.status == 0 and rollout.state.live == "blue" and "HAD BEEN" not in answer.message


def test_a_rollback_of_a_share_by_hand_loses_nobody_to_a_dead_colour(rollout):
    rollout.run("split", "25")
    rollout.host.stop("blue")
    refused = rollout.run("rollback")
    assert refused.status == 1 and rollout.state.split == 25
    assert (
        "blue is down, and green serves 25 % of the users" in refused.message and "'appliance swap'" in refused.message
    )
    # Where both are, there is nothing to lose, and the person is told.
    rollout.host.stop("green")
    answer = rollout.run("rollback")
    assert (answer.status, rollout.state.split) == (3, 0) and "WHICH DOESN'T ANSWER" in answer.message, answer.message


def test_on_a_full_disk_no_share_by_hand_comes_back(rollout, monkeypatch):
    rollout.configure(canary_step_seconds=20)
    rollout.run("split", "25")
    assert canary(rollout).status == 0

    def full_disk(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Routing, "switch", full_disk)
    assert rollout.run("abort").status == 0
    assert (rollout.state.live, rollout.state.split) == ("blue", 0)


@pytest.mark.parametrize("writes", [1, 2], ids=["the step", "the step and its undoing"])
def test_a_step_that_a_full_disk_kept_back_is_made_later(rollout, monkeypatch, writes):
    rollout.configure(canary_step_seconds=20)
    canary(rollout)
    number, real, done = present(rollout).number, plan.write, []

    def full_disk(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "the routing")

    def few(*arguments):
        done.append(1)
        real(*arguments) if len(done) < writes else full_disk()

    def advance():
        engine = rollout.engine()
        return engine.run("canary", lambda: Rollouts(engine).advance(number))

    for _ in range(2):
        with monkeypatch.context() as patch:
            done.clear()
            patch.setattr(Routing, "switch", full_disk)
            if writes == 2:
                patch.setattr(plan, "write", few)
            failed = advance()
        assert not failed.ok and failed.message.startswith("the routing: "), failed.message
        assert Rollouts(rollout.engine()).under_way() is not None and rollout.state.split == 1
        assert present(rollout).step == (0 if writes == 1 else 1)
        assert "1 % of users" in rollout.run("follow", "--seconds", "0").message
    assert advance().ok
    assert (rollout.state.split, present(rollout).step) == (5, 1)


def test_on_a_full_disk_a_plan_that_cant_be_written_ends_no_other(rollout, full):
    rollout.configure(bake_seconds=20)
    faulty(rollout, "some-500").run("swap")
    carry_out(rollout)
    ended = present(rollout)
    rollout.host.running["green"].faults.clear()
    full.update((plan.CANARY, plan.BAKE, plan.ABORTED))
    for command in (["swap"], ["swap", "--strategy", "canary"]):
        answer = rollout.run(*command)
        assert answer.status == 1 and "disk is full" in answer.message
    assert present(rollout) == ended and rollout.state.live == "blue"


def test_a_canary_without_a_bake_whose_end_isnt_recorded_is_live_and_over(rollout, full):
    rollout.configure(bake_seconds=0)
    full.add(plan.DONE)
    answer = canary(rollout, "--steps", "100")
    assert (answer.status, answer.json["changed"], rollout.state.live) == (0, True, "green"), answer.message
    assert "isn't recorded" in answer.message
    assert present(rollout).phase == plan.DONE and rollout.run("follow").status == 0


def test_a_bake_whose_end_cant_be_kept_at_all_stays_live(rollout, full, monkeypatch):
    monkeypatch.setattr(watch, "_AGAIN_SECONDS", 0.02)
    assert rollout.run("swap").status == 0
    full.add(plan.DONE)
    monkeypatch.setattr(plan, "close", lambda *_: None)
    # The watch doesn't take it for a failure of the release.
    before = len(rollout.audit())
    thread = in_background(rollout)
    wait_for(lambda: len(rollout.audit()) > before)
    assert rollout.audit()[-1]["outcome"] == "failed" and rollout.state.live == "green"
    full.clear()
    thread.join(20)
    assert present(rollout).phase == plan.DONE and rollout.state.live == "green"


def no_way_back(box, patch):
    """Let green go live and answer 502, and let nothing lead back from there."""
    box.door.faults.add("green")

    def fails(*_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    real = Routing.switch
    patch.setattr(Routing, "switch", lambda s, state: real(s, state) if state.live == "green" else fails())
    real_link = Routing.point_to
    patch.setattr(
        Routing, "point_to", lambda s, n: real_link(s, n) if (s.states / str(n) / "green").exists() else fails()
    )


@pytest.mark.parametrize("strategy", ["canary", "at-once"])
def test_a_switch_that_cant_be_undone_stays_watched(rollout, strategy):
    rollout.configure(bake_seconds=20)
    with pytest.MonkeyPatch.context() as patch:
        no_way_back(rollout, patch)
        answer = canary(rollout, "--steps", "100") if strategy == "canary" else rollout.run("swap")
        assert answer.status == 1 and "SWITCHING BACK FAILED" in answer.message
        assert rollout.state.live == "green" and present(rollout).phase == plan.BAKE
    assert Rollouts(rollout.engine()).under_way() is not None
    carry_out(rollout)
    assert present(rollout).phase == plan.ROLLED_BACK and rollout.state.live == "blue"


def test_a_promotion_that_cant_be_undone_stays_watched(rollout):
    rollout.configure(bake_seconds=20, canary_step_seconds=20)
    canary(rollout, "--steps", "50,100")
    rollout.run("promote")
    with pytest.MonkeyPatch.context() as patch:
        no_way_back(rollout, patch)
        engine = rollout.engine()
        result = engine.run("promote", lambda: Rollouts(engine).advance(present(rollout).number))
        assert not result.ok and "SWITCHING BACK FAILED" in result.message
    assert rollout.state.live == "green" and present(rollout).phase == plan.BAKE
    carry_out(rollout)
    assert present(rollout).phase == plan.ROLLED_BACK and (rollout.state.live, rollout.state.split) == ("blue", 0)


def test_a_switch_that_failed_says_why_on_a_full_disk(rollout, full):
    rollout.door.faults.add("green")
    full.add(plan.ABORTED)
    answer = rollout.run("swap")
    assert answer.status == 1 and "502" in answer.message and "switched back to blue" in answer.message
    carry_out(rollout)
    assert Rollouts(rollout.engine()).under_way() is None and rollout.state.live == "blue"


def test_a_promotion_that_fails_goes_back_altogether(rollout):
    canary(rollout, "--steps", "50,100")
    rollout.door.faults.add("green")
    rollout.configure(synthetic_per_second=0, judge_min_requests=1)
    thread = in_background(rollout)
    rollout.run("promote")
    thread.join(10)
    assert present(rollout).phase == plan.ROLLED_BACK
    assert (rollout.state.live, rollout.state.split) == ("blue", 0)


def disk(box, patch):
    def fails(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "the routing")

    patch.setattr(Routing, "switch", fails)


def docker(box, patch):
    box.host.docker_fault = (500, {"message": "hangs"})
    patch.callback = lambda: setattr(box.host, "docker_fault", None)


def nginx(box, patch):
    """It dies at the moment of the switch."""
    ask = FrontDoor._ask

    def gone(self, connection, body, request_id, *more, **options):
        if "fresh" in request_id:
            raise Disconnected("Connection refused")
        return ask(self, connection, body, request_id, *more, **options)

    patch.setattr(FrontDoor, "_ask", gone)


@pytest.mark.parametrize("fault", [disk, docker, nginx])
@pytest.mark.parametrize("lasts", [False, True], ids=["for a while", "for good"])
def test_a_promotion_that_fails_by_no_fault_of_the_release_is_tried_again(rollout, monkeypatch, fault, lasts):
    monkeypatch.setattr(watch, "_AGAIN_SECONDS", 0.1)
    rollout.configure(judge_patience_seconds=1.0 if lasts else 60)
    assert canary(rollout, "--steps", "50,100").status == 0
    with monkeypatch.context() as patch:
        fault(rollout, patch)
        rollout.run("promote")
        before = len(rollout.audit())
        thread = in_background(rollout)
        if lasts:
            wait_for(lambda: not present(rollout).under_way, 30)
        else:
            wait_for(lambda: len(rollout.audit()) > before + 2)
            assert present(rollout).phase == plan.CANARY and (rollout.state.live, rollout.state.split) == ("blue", 50)
        getattr(patch, "callback", lambda: None)()
    thread.join(30)
    if lasts:
        assert (rollout.state.live, rollout.state.split) == ("blue", 0)
        assert present(rollout).phase == plan.ROLLED_BACK and "it couldn't go on" in present(rollout).reason
        assert present(rollout).cause == ("front door" if fault is nginx else "host")
    else:
        assert present(rollout).phase == plan.DONE and rollout.state.live == "green", present(rollout)


def test_a_watch_that_cant_start_leaves_everything_as_it_was(rollout):
    rollout.host.start_watch = (1, "", "Unit appliance-rollout.service not found.")
    before = rollout.state
    for command in (["swap"], ["swap", "--strategy", "canary"]):
        answer = rollout.run(*command)
        assert answer.status == 1 and "nobody would watch" in answer.message
        assert rollout.state.number == before.number and Rollouts(rollout.engine()).under_way() is None


@pytest.mark.parametrize(
    ("command", "flag", "said"),
    [
        (["split", "25"], "split", "green serves 25 % of users"),
        (["shadow", "20"], "shadow", "20 % of requests are copied"),
        (["maintenance", "on"], "maintenance", "IN MAINTENANCE"),
    ],
)
def test_shares_and_maintenance_by_hand(rollout, command, flag, said):
    off = {"split": "0", "shadow": "0", "maintenance": "off"}[flag]
    assert rollout.run(*command).json["changed"] and not rollout.run(*command).json["changed"]
    assert getattr(rollout.state, flag) and (rollout.routing / "current" / flag).exists()
    status = rollout.run("status")
    assert said in status.message and status.json[flag] == getattr(rollout.state, flag)
    assert rollout.run(command[0], off).json["changed"]
    assert not getattr(rollout.state, flag) and not (rollout.routing / "current" / flag).exists()


@pytest.mark.parametrize("command", [["split", "100"], ["split", "-1"], ["shadow", "101"]])
def test_no_percentage(rollout, command):
    answer = rollout.run("--", *command) if "-1" in command else rollout.run(*command)
    assert answer.status == 2
    assert rollout.state.number == 1


def test_maintenance_outlasts_a_swap_and_a_split_doesnt(rollout):
    rollout.run("maintenance", "on")
    rollout.run("split", "25")
    rollout.configure(bake_seconds=0)
    swapped = rollout.run("swap")
    assert swapped.status == 0 and "rollout" not in swapped.json
    assert (rollout.state.live, rollout.state.split, rollout.state.maintenance) == ("green", 0, True)


def test_traffic_goes_back_also_where_systemd_doesnt_answer(rollout, monkeypatch):
    rollout.configure(bake_seconds=20)
    monkeypatch.setenv("SERVICE_RESULT", "success")
    assert rollout.run("swap").status == 0

    def silent(command, timeout=0.0):
        if command[0] == "systemctl" and command[1] in ("is-system-running", "start"):
            assert 0 < timeout <= 10, "systemd has its own patience with what settles"
            raise Failed(f"{command[1]} didn't end")
        return real(command, timeout)

    real = host.run
    monkeypatch.setattr(host, "run", silent)
    answer = rollout.run("watch", "--settle")
    assert answer.status == 0 and rollout.state.live == "blue", answer.message
    assert present(rollout).phase == plan.ROLLED_BACK


def test_a_watch_that_is_stopped_sends_traffic_back_also_where_systemd_doesnt_answer(rollout, monkeypatch):
    rollout.configure(canary_step_seconds=20)
    canary(rollout)
    real = host.run

    def silent(command, *more):
        if "is-system-running" in command:
            raise Failed("systemctl didn't end")
        return real(command, *more)

    monkeypatch.setattr(host, "run", silent)
    timer = threading.Timer(0.3, lambda: os.kill(os.getpid(), watch.signal.SIGTERM))
    timer.start()
    assert carry_out(rollout).ok
    assert present(rollout).phase == plan.ROLLED_BACK and rollout.state.split == 0
