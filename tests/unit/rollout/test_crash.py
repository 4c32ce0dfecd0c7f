"""Power cuts: the process ends at every single call that changes the file system."""

from __future__ import annotations

import pytest
from power_cuts import DIED, in_child, record
from rollout import plan
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
            "states",
        ]
        if status == 0:
            assert die_at > 15
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


def test_a_crash_at_any_call_of_a_whole_swap(box):
    box.live_on_blue()
    die_at, target = 0, "green"
    while True:
        # Every third call keeps the test short; the routing itself is tested at every call above.
        die_at += 3
        old = box.state
        status = in_child(lambda t=target: box.engine().run("swap", lambda: box.engine().swap(t)), die_at, True)
        present = box.state
        assert present == old or (present.live, present.number) == (target, old.number + 1), die_at
        assert box.run("swap", "--to", target).status == 0, die_at
        assert box.state.live == target
        target = "blue" if target == "green" else "green"
        if status == 0:
            assert die_at > 20
            return
        assert status == DIED


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
    assert sorted(p.name for p in box.routing.iterdir()) == ["current", "states"]
    assert box.state.live == "green"


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


@pytest.mark.parametrize(
    ("before", "what"),
    [([], _begin), ([], _swap), ([_begin], _go_on), ([_begin], _promote), ([_begin], _abort), ([_swap], _abort)],
    ids=["begin", "swap", "next step", "promote", "abort a canary", "abort a bake"],
)
def test_a_crash_at_any_call_of_a_rollout_is_settled(box, before, what):
    box.live_on_blue()
    box.configure(**ROLLOUT)
    die_at = 0
    while True:
        # Every fifth call keeps the test short; the routing itself is tested at every call.
        die_at += 5
        for step in before:
            assert step(box).ok
        status = in_child(lambda: what(box), die_at, True)
        assert status in (0, DIED)
        settled = box.run("watch", "--settle")
        assert settled.status == 0, (die_at, settled.message)
        assert (box.state.live, box.state.split) == ("blue", 0), die_at
        assert Rollouts(box.engine()).under_way() is None, die_at
        if status == 0:
            assert die_at > 20
            return
