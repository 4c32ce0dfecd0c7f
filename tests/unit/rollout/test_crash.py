"""Power cuts: the process ends at every single call that changes the file system."""

from __future__ import annotations

import os

import pytest
from rollout.routing import Routing, State

CALLS = ("open", "write", "fsync", "close", "mkdir", "chmod", "fchmod", "rename", "symlink", "unlink", "rmdir")
DIED = 77


def _in_child(function, die_at, before):
    """Run `function` in a child that ends at its `die_at`-th call, before or after it. Returns the exit status."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    count = 0

    def wrap(real):
        def call(*arguments, **options):
            nonlocal count
            count += 1
            if before and count == die_at:
                os._exit(DIED)
            result = real(*arguments, **options)
            if count == die_at:
                os._exit(DIED)
            return result

        return call

    status = 1
    try:
        for name in CALLS:
            setattr(os, name, wrap(getattr(os, name)))
        function()
        status = 0
    finally:
        os._exit(status)


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
        status = _in_child(lambda r=routing: r.switch(_state("green", "blue")), die_at, before)
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
    log, paths = [], {}
    real_open, real_fsync, real_rename = os.open, os.fsync, os.rename

    def opened(path, *rest, **options):
        descriptor = real_open(path, *rest, **options)
        paths[descriptor] = str(path)
        return descriptor

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "fsync", lambda d: (log.append(("fsync", paths[d])), real_fsync(d)))
    monkeypatch.setattr(os, "rename", lambda a, b: (log.append(("rename", str(b))), real_rename(a, b)))
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
        status = _in_child(lambda t=target: box.engine().run("swap", lambda: box.engine().swap(t)), die_at, True)
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
