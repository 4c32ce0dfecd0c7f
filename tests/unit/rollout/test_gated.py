"""The gate as the commands have it: no release goes live that hasn't passed it, whatever broke its deploy off."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest
from rollout import plan
from rollout_stand_ins import MEASURED, wait_for

MISSED = "p99 in ms: 3000, at most 2000"


class Gated:
    """An appliance whose gate is on, with release 1 live on blue."""

    def __init__(self, box):
        self.box = box
        box.configure(gate={"enabled": True})
        self.locust()
        assert box.deploy("blue", box.bundle("1.0.0", 0.5)).status == 0
        assert box.run("init", "blue").status == 0
        assert self.loads == [], "where nobody is live, there is nobody to protect"

    def locust(self, script="", **changes):
        """What Locust does in sh, and reports."""
        told = f'echo "$LOADTEST_COLOUR $LOADTEST_URL" >>{self.box.root}/loads\n'
        report = f"cat <<'END'\n{json.dumps(MEASURED | changes)}\nEND\n"
        # Renamed into place: a shell that runs goes on reading the old one.
        written = self.box.root / "locust.new"
        written.write_text(f"#!/bin/sh\n{told}{script}\n{report}")
        written.chmod(0o755)
        written.rename(self.box.locust)

    @property
    def loads(self):
        """The colour and the address of each load test so far."""
        path = self.box.root / "loads"
        return path.read_text().splitlines() if path.exists() else []

    @property
    def load(self):
        return f"green {self.box.door.url}/test/predict"

    def verdict(self, release):
        path = self.box.state_dir / f"releases/{release}/gate.json"
        about = json.loads(path.read_text()) if path.exists() else {}
        return about.get("verdict"), about.get("who")

    def restarts(self):
        return len([call for call in self.box.host.calls if "restart" in call])

    def killed(self, version="2.0.0"):
        """A deploy whose engine dies in the middle of the load test."""
        self.locust("exec sleep 60")
        bundle = self.box.bundle(version, 0.75)
        before = len(self.loads)
        process = self.box.popen("deploy", "green", "--bundle", bundle, "--image", "appliance/model:1")
        wait_for(lambda: len(self.loads) > before)
        process.kill()
        process.communicate(timeout=20)
        # systemd would end it, too.
        self.box.host.load.kill()
        self.locust()
        return bundle

    def ungated(self):
        """Release 2 on green as a fresh host has it, placed before a colour was live."""
        self.box.configure(gate={"enabled": False})
        assert self.box.deploy("green", self.box.bundle("2.0.0", 0.75)).status == 0
        self.box.configure(gate={"enabled": True})
        (self.box.state_dir / "releases/2/gate.json").unlink()
        return self


@pytest.fixture
def gated(box):
    return Gated(box)


def test_a_release_that_passes_may_go_live(gated):
    box = gated.box
    answer = box.deploy("green", box.bundle("2.0.0", 0.75))
    assert answer.status == 0 and "the load test is passed" in answer.message
    assert gated.loads == [gated.load]
    assert gated.verdict(2) == ("passed", "alice")
    stages = json.loads((box.state_dir / "releases/2/checks.json").read_text())["checks"]
    assert [stage["stage"] for stage in stages] == ["deploy", "gate"]
    again = box.deploy("green", box.state_dir / "bundles/simplemodel/2.0.0")
    assert (again.status, again.json["changed"]) == (0, False) and box.audit()[-1]["outcome"] == "nothing"
    assert box.run("swap").status == 0 and box.state.live == "green"
    assert box.run("swap").status == 0 and box.state.live == "blue", "what has been live is let through"
    assert gated.loads == [gated.load], "once is enough"


def test_a_release_that_fails_leaves_everything_as_it_was(gated):
    box = gated.box
    assert box.deploy("green", box.bundle("2.0.0", 0.75)).status == 0
    before, env = box.snapshot(), (box.config_dir / "green.env").read_bytes()
    gated.locust(p99_ms=3000)
    directory = box.bundle("3.0.0", 0.9)
    answer = box.deploy("green", directory, json_output=False)
    assert answer.status == 1
    last = answer.err.strip().splitlines()[-1]
    assert f"can't be placed on green: it doesn't pass the load test: {MISSED} (" in last
    assert "simplemodel 2.0.0, release 2 was put back and is ready" in last
    assert (box.snapshot(), (box.config_dir / "green.env").read_bytes()) == (before, env)
    assert box.host.running["blue"].version == "1.0.0" and box.host.running["green"].version == "2.0.0"
    assert gated.verdict(3) == ("failed", "alice")
    names = {path.name for path in (box.state_dir / "releases/3").iterdir()}
    assert names >= {
        "load_test_report.json",
        "load_test_evaluation.json",
        "serve_image_spec.json",
        "context.json",
        "gate.json",
    }
    evaluation = json.loads((box.state_dir / "releases/3/load_test_evaluation.json").read_text())
    assert (evaluation["passed"], evaluation["reasons"]) == (False, [MISSED])
    assert box.audit()[-1]["outcome"] == "failed" and MISSED in box.audit()[-1]["message"]
    # What was put back has passed before.
    assert box.run("swap").status == 0 and box.state.live == "green"


def test_a_first_release_that_fails_leaves_its_colour_empty(gated):
    gated.locust(failures=400, errors={"status 500": 400})
    answer = gated.box.deploy("green", gated.box.bundle("2.0.0", 0.75))
    assert answer.status == 1 and "green is empty again" in answer.message
    assert not (gated.box.config_dir / "green.env").exists() and gated.box.host.enabled == {"blue"}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_the_load_test_puts_the_earlier_release_back(gated, number):
    box = gated.box
    assert box.deploy("green", box.bundle("2.0.0", 0.75)).status == 0
    gated.locust("exec sleep 60")
    process = box.popen("deploy", "green", "--bundle", box.bundle("3.0.0"), "--image", "appliance/model:1")
    wait_for(lambda: len(gated.loads) == 2)
    process.send_signal(number)
    answer = box.finish(process)
    assert answer.status == 1 and "release 2 was put back" in answer.message
    assert box.host.load.wait(20) == -signal.SIGKILL
    assert gated.verdict(3) == (None, None)


def test_a_deploy_that_died_in_the_load_test_is_taken_up_where_it_was(gated):
    box = gated.box
    bundle = gated.killed()
    assert box.run("status").json["colours"]["green"]["status"] == "ready" and gated.verdict(2) == (None, None)
    restarts = gated.restarts()
    told = box.deploy("green", bundle, "appliance/model:1", "--dry-run")
    assert told.status == 0 and "would put the load test on it" in told.message
    answer = box.deploy("green", bundle)
    assert (answer.status, answer.json["changed"], answer.json["release"]) == (0, False, 2)
    assert "the load test is passed" in answer.message
    assert gated.loads == [gated.load] * 2 and gated.verdict(2)[0] == "passed"
    assert gated.restarts() == restarts, "what is well isn't restarted"
    assert box.host.enabled == {"blue", "green"}, "it comes back at boot"
    assert "is ready" in box.deploy("green", bundle).message and len(gated.loads) == 2


def test_a_deploy_that_died_in_the_load_test_may_turn_out_to_fail(gated):
    bundle = gated.killed()
    gated.locust(p99_ms=3000)
    answer = gated.box.deploy("green", bundle)
    assert answer.status == 1 and MISSED in answer.message and "doesn't go live: deploy another" in answer.message
    assert gated.verdict(2)[0] == "failed" and gated.box.run("swap").status == 1
    assert gated.box.state.live == "blue"


SWITCHES = {
    "at once": ["swap"],
    "watched": ["swap"],
    "canary": ["swap", "--strategy", "canary", "--detach"],
    "canary of one step": ["swap", "--strategy", "canary", "--steps", "100", "--detach"],
    "by hand": ["split", "25"],
}


@pytest.mark.parametrize("how", SWITCHES)
def test_what_died_in_the_load_test_passes_it_before_anybody_gets_it(gated, how):
    box, command = gated.box, SWITCHES[how]
    box.configure(bake_seconds=60 if how == "watched" else 0)
    gated.killed()
    before = box.snapshot()
    gated.locust(p99_ms=3000)
    answer = box.run(*command)
    assert answer.status == 1 and box.audit()[-1]["outcome"] == "refused"
    assert f"release 2 doesn't go live: it doesn't pass the load test: {MISSED}" in answer.message
    assert box.snapshot() == before and gated.verdict(2)[0] == "failed"
    assert plan.read(box.state_dir / "rollout.json") is None
    gated.locust()
    answer = box.run(*command)
    assert answer.status == 0 and gated.verdict(2)[0] == "passed", answer.message
    assert gated.loads == [gated.load] * 3 and "hasn't passed the load test yet" in answer.err
    assert (box.state.live == "green") == (how not in ("canary", "by hand"))
    assert box.state.split == {"canary": 1, "by hand": 25}.get(how, 0)
    assert box.host.enabled == {"blue", "green"}


@pytest.mark.parametrize("more", [[], ["--strategy", "canary"]])
def test_a_dry_run_of_a_switch_says_that_the_load_test_comes_first(gated, more):
    answer = gated.ungated().box.run("swap", "--dry-run", *more)
    assert answer.status == 0 and answer.json["would_change"] and "would put the load test on it" in answer.message
    assert gated.loads == [] and gated.verdict(2) == (None, None)


def test_on_a_fresh_host_the_first_swap_brings_the_load_test(box):
    box.configure(gate={"enabled": True})
    for colour, version in (("blue", "1.0.0"), ("green", "2.0.0")):
        assert box.deploy(colour, box.bundle(version)).status == 0
    assert box.run("init", "blue").status == 0
    answer = box.run("swap")
    assert answer.status == 1 and "Locust isn't installed" in answer.message and box.state.live == "blue"
    box.configure(gate={"enabled": False})
    assert box.run("swap").status == 0, "who doesn't want a gate has none"


def test_a_signal_ends_the_load_test_of_a_swap(gated):
    gated.ungated().locust("exec sleep 60")
    process = gated.box.popen("swap")
    wait_for(lambda: gated.loads)
    process.send_signal(signal.SIGTERM)
    answer = gated.box.finish(process)
    assert answer.status == 1 and "nothing was changed" in answer.message
    assert gated.box.host.load.wait(20) == -signal.SIGKILL and gated.box.state.live == "blue"


def test_a_release_that_an_earlier_engine_made_live_needs_no_load_test(gated):
    box = gated.ungated().box
    box.configure(gate={"enabled": False})
    assert box.run("swap").status == 0 and box.run("swap").status == 0
    box.configure(gate={"enabled": True})
    (box.routing / "states/99").mkdir()
    assert box.run("swap").status == 0 and box.state.live == "green" and gated.loads == []


def test_a_state_that_was_never_pointed_to_makes_nothing_live(gated):
    box = gated.ungated().box
    shutil.copytree(box.routing / "states/1", box.routing / "states/2")
    about = json.loads((box.routing / "states/2/state.json").read_text())
    about |= {"number": 2, "live": "green", "releases": {"blue": 1, "green": 2}}
    os.chmod(box.routing / "states/2/state.json", 0o644)
    (box.routing / "states/2/state.json").write_text(json.dumps(about))
    assert box.engine().owes_gate(2) and not box.engine().owes_gate(1)


def test_who_deployed_without_a_gate_is_on_record(gated):
    box = gated.box
    box.configure(gate={"enabled": False})
    assert box.deploy("green", box.bundle("2.0.0", 0.75), "appliance/model:1", "--who", "bob").status == 0
    assert gated.verdict(2) == ("disabled", "bob")
    box.configure(gate={"enabled": True})
    assert box.run("swap").status == 0 and gated.loads == [gated.load]


def test_a_rollback_never_waits_for_a_load_test(gated):
    box = gated.box
    for version in ("2.0.0", "3.0.0"):
        idle = "green" if box.state.live == "blue" else "blue"
        assert box.deploy(idle, box.bundle(version, 0.75)).status == 0 and box.run("swap").status == 0
    loads = len(gated.loads)
    gated.locust("exit 1")
    for number in (2, 3):
        (box.state_dir / f"releases/{number}/gate.json").unlink()
    assert box.run("rollback", "--dry-run").status == 0
    assert box.run("rollback").status == 0 and box.state.live == "green"
    assert box.run("rollback", "--to", "1", "--dry-run").status == 0
    assert box.run("rollback", "--to", "1").status == 0 and box.state.live == "blue"
    assert len(gated.loads) == loads and gated.verdict(4) == ("skipped", "alice")


def test_a_rollback_to_a_release_isnt_a_way_around_the_load_test(gated):
    box = gated.box
    gated.locust(p99_ms=3000)
    assert box.deploy("green", box.bundle("2.0.0", 0.75)).status == 1 and gated.verdict(2)[0] == "failed"
    gated.killed("3.0.0")
    loads, before = gated.loads, box.snapshot()
    # Placed nowhere and condemned; on green and never tested to the end.
    for number in (2, 3):
        for more in ([], ["--dry-run"]):
            answer = box.run("rollback", "--to", number, *more)
            assert answer.status == 1 and f"to release {number}: it has never been live" in answer.message
            assert "appliance deploy" in answer.message and "load test" in answer.message
    assert "release 9 has no record" in box.run("rollback", "--to", "9").message
    assert box.snapshot() == before and gated.loads == loads
    assert {path.name for path in (box.state_dir / "releases").iterdir()} == {"1", "2", "3"}
    box.configure(gate={"enabled": False})
    assert box.run("rollback", "--to", "3").status == 0, "who doesn't want a gate has none"


def test_what_was_live_before_all_states_that_are_kept_may_be_rolled_back_to(gated):
    box = gated.ungated().box
    box.configure(gate={"enabled": False})
    assert box.run("swap").status == 0 and box.run("swap").status == 0
    box.configure(gate={"enabled": True})
    for flag in ("on", "off") * 26:
        assert box.run("maintenance", flag).status == 0
    engine = box.engine()
    engine.routing.switch(engine.routing.read()._replace(previous=None, previous_release=None))
    engine.routing.prune()
    assert engine.owes_gate(2)
    gated.locust("exit 1")
    answer = box.run("rollback", "--to", "2")
    assert answer.status == 0 and box.state.live == "green", answer.message
