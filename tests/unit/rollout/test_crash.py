"""Power cuts: the process ends at every single call that changes the file system."""

from __future__ import annotations

import pytest
from power_cuts import DIED, Saved, cuts, in_child, record
from rollout import audit, plan
from rollout.rollouts import Rollouts
from rollout.routing import Routing, State


def _state(live, previous=None):
    return State(live=live, since="2026-01-31T12:00:00Z", who="tester", previous=previous)


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("first", [True, False], ids=["first", "later"])
def test_a_crash_at_any_call_leaves_the_old_or_the_new_state(tmp_path, before, first):
    for die_at in range(1, 200):
        routing = Routing(tmp_path / str(die_at) / "routing", ("blue", "green"))
        if not first:
            routing.switch(_state("blue"))
        old = routing.read()
        status = in_child(lambda r=routing: r.switch(_state("green", "blue")), die_at, before)
        present = routing.read()
        assert present == old or (present.live, present.previous) == ("green", "blue"), die_at
        for directory in routing.states.glob("[0-9]*"):
            assert {"state.json"} < {p.name for p in directory.iterdir()}, "what bears a number is complete"
            assert (directory / "state.json").read_text().endswith("}\n")
        after, _ = routing.switch(_state("blue", "green"))
        assert routing.read() == after
        assert after.number == (present.number if present else after.number - 1) + 1
        names = sorted(p.name for p in routing.states.iterdir())
        assert all(n.isdigit() for n in names) and sorted(p.name for p in routing.directory.iterdir()) == [
            "current",
            "shares",
            "states",
        ]
        if status == 0:
            # The first time the share of all users is made, a link for each bucket.
            assert die_at > (150 if first else 25)
            return
        assert status == DIED
    raise AssertionError("the switch never came to its end")


def test_everything_is_durable_before_it_is_named(tmp_path, monkeypatch):
    """A power cut loses what wasn't fsynced: each rename must come after the fsync of all that it names."""
    routing = Routing(tmp_path / "routing", ("blue", "green"))
    routing.switch(_state("blue"))
    log = record(monkeypatch)
    routing.switch(_state("green"))
    new, states, top = str(routing.states / ".new-2"), str(routing.states), str(routing.directory)
    steps = [
        ("fsync", f"{new}/green"),
        ("fsync", f"{new}/state.json"),
        ("fsync", new),
        ("rename", f"{states}/2"),
        ("fsync", states),
        ("rename", f"{top}/current"),
        ("fsync", top),
    ]
    assert [step for step in log if step in steps][-len(steps) :] == steps


def _check(box, lives):
    """What must hold after a cut, whatever was under way."""
    assert box.state.live in lives
    status = box.run("status")
    assert status.status == 0 and status.json["live"] == box.state.live, status.message
    return _audit(box)


def _audit(box):
    """The entries of the audit log, of which a cut in the midst of a write may have torn one."""
    lines = (box.state_dir / "audit.jsonl").read_text().splitlines()
    entries = audit.read(box.state_dir / "audit.jsonl")
    assert len(lines) - 1 <= len(entries) <= len(lines)
    return entries


@pytest.mark.parametrize(
    ("command", "flag", "wanted"),
    [
        (["swap", "--to", "green"], "live", "green"),
        (["split", "2"], "split", 2),
        (["shadow", "3"], "shadow", 3),
        (["maintenance", "on"], "maintenance", True),
    ],
    ids=["swap", "split", "shadow", "maintenance"],
)
def test_a_crash_at_any_call_of_a_command_is_made_up_for_by_the_next(box, command, flag, wanted):
    box.configure(verify_requests=1)
    box.live_on_blue()
    old, saved = box.state, Saved(box)
    for number in cuts(lambda: box.run(*command), saved.put_back):
        entries = _check(box, ("blue", "green"))
        assert box.state == old or (box.state.number == old.number + 1 and getattr(box.state, flag) == wanted), number
        assert box.run(*command).status == 0, number
        assert getattr(box.state, flag) == wanted, number
        assert len(_audit(box)) == len(entries) + 1 and _audit(box)[-1]["command"] == command[0], number
    assert number > 15


def test_a_crash_at_any_call_of_a_rollback_is_made_up_for_by_the_next(box):
    box.configure(verify_requests=1)
    box.live_on_blue()
    assert box.run("swap").status == 0
    saved, undone = Saved(box), []
    for number in cuts(lambda: box.run("rollback"), saved.put_back):
        _check(box, ("blue", "green"))
        undone.append(box.state.live == "blue")
        # Once more would be back again.
        if not undone[-1]:
            assert box.run("rollback").status == 0, number
        assert (box.state.live, box.state.previous) == ("blue", "green"), number
    # There is one instant at which it happens.
    assert undone == sorted(undone) and {*undone} == {False, True} and number > 15


def test_a_crash_at_any_call_of_a_deploy_leaves_production_alone_and_the_next_works(box, monkeypatch):
    box.configure(verify_requests=1)
    box.live_on_blue()
    directory, before, saved = box.bundle("3.0.0", 0.25), box.snapshot(), Saved(box)

    def again():
        saved.put_back()
        box.host.start("green")

    def deploy():
        box.host._ask = box.host.ask_from_afar
        box.deploy("green", directory)

    for number in cuts(deploy, again):
        _check(box, ("blue",))
        assert box.snapshot() == before and box.host.running["blue"].env["MODEL_RELEASE"] == "1", number
        # What the unit would start with at the next boot is a whole release, too.
        releases = box.engine().releases
        assert releases.get(releases.placed("green")).version in ("2.0.0", "3.0.0"), number
        answer = box.deploy("green", directory)
        assert answer.status == 0, (number, answer.message)
        running, placed = box.host.running["green"], box.engine().releases.placed("green")
        assert (running.version, running.env["MODEL_RELEASE"]) == ("3.0.0", str(placed)), number
        assert box.engine().releases.get(placed).version == "3.0.0" and placed in (3, 4), number
        names = {path.name for path in (box.state_dir / "releases").iterdir()}
        assert names == {str(one) for one in range(1, placed + 1)}, number
        _audit(box)
    assert number > 20


def test_leftovers_are_removed(box):
    box.live_on_blue()
    (box.routing / ".current.new").symlink_to("states/9")
    (box.routing / "states/.new-2").mkdir()
    (box.routing / "states/.new-2/green").touch()
    (box.routing / "states/2").mkdir()
    (box.routing / "states/2/green").touch()
    assert box.state.live == "blue"
    assert box.run("swap").json["state"] == 2
    assert sorted(p.name for p in (box.routing / "states").iterdir()) == ["1", "2"]
    assert sorted(p.name for p in box.routing.iterdir()) == ["current", "shares", "states"]
    assert box.state.live == "green"


WATCH = ["systemctl", "start", "--no-block", "appliance-rollout.service"]
ROLLOUT = {"canary_step_seconds": 60, "bake_seconds": 60}


def _begin(box):
    engine = box.engine()
    return engine.run("canary", lambda: Rollouts(engine).canary(None))


def _go_on(box):
    engine = box.engine()
    return engine.run("canary", lambda: Rollouts(engine).advance(plan.read(engine.config.rollout_file).number))


def _promote(box):
    box.run("promote")
    return _go_on(box)


def _swap(box):
    engine = box.engine()
    return engine.run("swap", lambda: Rollouts(engine).swap())


def _abort(box):
    engine = box.engine()
    return engine.run("abort", Rollouts(engine).abort)


def _roll_back(box):
    return box.run("rollback")


def _pause(box):
    return box.run("pause")


@pytest.mark.parametrize(
    ("before", "what"),
    [
        ([], _begin),
        ([], _swap),
        ([_begin], _go_on),
        ([_begin], _promote),
        ([_begin], _pause),
        ([_begin], _abort),
        ([_begin], _roll_back),
        ([_swap], _abort),
        ([_swap], _roll_back),
    ],
    ids=[
        "begin",
        "swap",
        "next step",
        "promote",
        "pause",
        "abort a canary",
        "roll a canary back",
        "abort a bake",
        "roll a bake back",
    ],
)
def test_a_crash_at_any_call_of_a_rollout_is_settled(box, before, what):
    box.configure(**ROLLOUT, verify_requests=1)
    box.live_on_blue()
    for step in before:
        assert step(box).ok
    saved = Saved(box)

    def again():
        saved.put_back()
        box.host.calls.clear()

    def carried_out():
        box.host._ask = box.host.ask_from_afar
        what(box)

    for number in cuts(carried_out, again):
        _check(box, ("blue", "green"))
        if not before and Rollouts(box.engine()).under_way():
            assert WATCH in box.host.calls, f"nobody watches what is on record: {number}"
        settled = box.run("watch", "--settle")
        assert settled.status == 0, (number, settled.message)
        assert (box.state.live, box.state.split) == ("blue", 0), number
        assert Rollouts(box.engine()).under_way() is None, number
        _audit(box)
    assert number > 15


def test_a_crash_at_any_call_of_a_bakes_end_ends_it_or_sends_traffic_back(box):
    box.configure(**ROLLOUT, verify_requests=1)
    box.live_on_blue()
    assert _swap(box).ok
    saved, over = Saved(box), []
    for number in cuts(lambda: _go_on(box), saved.put_back):
        _check(box, ("green",))
        over.append(Rollouts(box.engine()).under_way() is None)
        settled = box.run("watch", "--settle")
        assert settled.status == 0, (number, settled.message)
        assert (box.state.live, box.state.split) == ("green" if over[-1] else "blue", 0), number
        assert Rollouts(box.engine()).under_way() is None, number
        _audit(box)
    assert over == sorted(over) and {*over} == {False, True} and number > 5


def test_a_crash_at_any_call_of_a_promotion_hands_nobody_to_a_dead_colour(box):
    box.configure(**ROLLOUT, verify_requests=1)
    box.live_on_blue()
    assert _begin(box).ok
    box.host.stop("blue")
    saved, settled = Saved(box), []

    def carried_out():
        box.host._ask = box.host.ask_from_afar
        _promote(box)

    for number in cuts(carried_out, saved.put_back):
        answer = box.run("watch", "--settle")
        settled.append((box.state.live, answer.status))
        if box.state.live == "green":
            continue
        found = Rollouts(box.engine()).under_way()
        assert found is not None and (found[0].phase, found[1].split) == (plan.CANARY, 1), (number, answer.message)
        assert _promote(box).ok and box.state.live == "green", number
        _audit(box)
    assert {("blue", 0), ("blue", 1), ("green", 1)} <= {*settled} and number > 15
