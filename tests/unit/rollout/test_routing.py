"""A split, a shadow and maintenance in the routing state: what nginx finds, what is read, what a crash leaves."""

from __future__ import annotations

import errno
import os
import shutil
import stat

import pytest
from power_cuts import DIED, in_child, record
from rollout.routing import Routing, RoutingBroken, State

SHARES = ("split", "shadow")


def state(live="blue", **more):
    return State(live=live, since="2026-01-31T12:00:00Z", who="tester", **more)


@pytest.fixture
def routing(tmp_path):
    return Routing(tmp_path / "routing", ("blue", "green"))


def buckets(directory):
    return {path.name for path in directory.iterdir()}


def at(minute, live, release, **more):
    since = f"2026-01-31T12:{minute:02}:00Z"
    return state(live, **more)._replace(since=since, releases={live: release})


def test_how_long_a_colour_has_served_its_release_is_known(routing):
    assert routing.became_live("blue") is None
    for minute, live, release in ((1, "blue", 1), (2, "green", 2), (3, "blue", 3), (4, "blue", 3), (5, "green", 4)):
        routing.switch(at(minute, live, release, split=minute % 2))
    assert routing.became_live("blue").since == "2026-01-31T12:03:00Z"
    assert routing.became_live("green").since == "2026-01-31T12:05:00Z"


@pytest.mark.parametrize("percent", [1, 5, 100])
@pytest.mark.parametrize("flag", SHARES)
def test_a_share_is_read_back_and_holds_its_buckets(routing, flag, percent):
    written, _ = routing.switch(state(**{flag: percent}))

    assert routing.read() == written
    assert getattr(written, flag) == percent
    assert buckets(routing.current / flag) == {str(bucket) for bucket in range(percent)}
    shortcuts = {"blue-serves", "green-serves"} if flag == "split" else set()
    assert buckets(routing.current) == {"blue", "state.json", flag} | shortcuts


def test_a_larger_share_keeps_the_users_of_a_smaller_one(routing):
    routing.switch(state(split=5))
    before = buckets(routing.current / "split")
    routing.switch(state(split=25))

    assert before < buckets(routing.current / "split")


def test_everything_at_once_and_then_nothing(routing):
    everything, _ = routing.switch(state(split=5, shadow=5, maintenance=True))
    assert routing.read() == everything
    assert buckets(routing.current) == {"blue", "state.json", "split", "shadow", "maintenance"}
    assert buckets(routing.shares) == {"5"}

    nothing, _ = routing.switch(state("green"))
    assert routing.read() == nothing
    assert (nothing.split, nothing.shadow, nothing.maintenance) == (0, 0, False)
    assert buckets(routing.current) == {"green", "state.json", "green-serves"}


@pytest.mark.parametrize("percent", [0, 1, 25, 100])
def test_one_look_tells_who_serves(routing, percent):
    routing.switch(state("green", split=percent))
    served = {path.parent.name + "/" + path.name for path in routing.current.glob("*-*/*")}
    assert served == {f"{'blue' if bucket < percent else 'green'}-serves/{bucket}" for bucket in range(100)}


@pytest.mark.parametrize("more", [{"shadow": 1}, {"maintenance": True}, {"split": 5, "maintenance": True}])
def test_what_takes_more_than_a_look_has_no_shortcut(routing, more):
    routing.switch(state(**more))
    assert not list(routing.current.glob("*-*"))


@pytest.mark.parametrize(
    ("more", "name", "target"),
    [
        ({}, "blue-serves", "../../shares/rest-5"),
        ({}, "green-serves", "../../shares/rest-0"),
        ({}, "green-serves", "../../shares/5"),
        ({"split": 5}, "green-serves", "../../shares/rest-0"),
        ({"maintenance": True}, "blue-serves", "../../shares/rest-0"),
        ({"shadow": 5}, "blue-serves", "../../shares/rest-0"),
    ],
)
def test_a_shortcut_that_doesnt_fit_the_state_is_refused(routing, more, name, target):
    for percent in (5, 0):
        routing.switch(state(split=percent))
    routing.switch(state(**more))
    link = routing.current / name
    link.unlink(missing_ok=True)
    link.symlink_to(target)
    with pytest.raises(RoutingBroken, match=f"a link {name} that doesn't fit"):
        routing.read()


def test_a_state_of_an_earlier_version_has_no_shortcuts(routing):
    written, _ = routing.switch(state(split=5))
    for link in routing.current.glob("*-*"):
        link.unlink()
    assert routing.read() == written


def test_nginx_may_read_shares_whatever_the_umask(routing):
    earlier = os.umask(0o077)
    try:
        routing.switch(state(split=1, maintenance=True))
    finally:
        os.umask(earlier)

    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in routing.directory.rglob("*")}
    assert {mode for path, mode in modes.items() if path.is_dir()} == {0o755}
    assert {mode for path, mode in modes.items() if path.is_file()} == {0o644}


@pytest.mark.parametrize("percent", [-1, 101])
@pytest.mark.parametrize("flag", SHARES)
def test_what_isnt_a_percentage_is_refused(routing, flag, percent):
    old, _ = routing.switch(state())

    with pytest.raises(ValueError, match=f"{percent} isn't a percentage"):
        routing.switch(state(**{flag: percent}))
    assert routing.read() == old


def _relink(link, target):
    """Let it lead to another directory, which exists."""
    link.unlink()
    link.symlink_to(target)
    link.resolve().mkdir(parents=True, exist_ok=True)


DAMAGE = {
    "gone": lambda link: link.unlink(),
    "another percentage": lambda link: _relink(link, "../../shares/1"),
    "not a number": lambda link: _relink(link, "../../shares/05"),
    "another directory": lambda link: _relink(link, "../../../shares/5"),
    "absolute": lambda link: _relink(link, link.resolve()),
    "not a link": lambda link: (link.unlink(), link.mkdir()),
    "share removed": lambda link: shutil.rmtree(link.resolve()),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("flag", SHARES)
def test_a_share_that_isnt_what_the_state_says_is_refused(routing, flag, damage):
    routing.switch(state(**{flag: 1}))
    routing.switch(state(**{flag: 5}))
    damage(routing.current / flag)

    with pytest.raises(RoutingBroken, match=f"a link {flag} that isn't the 5 % .*'appliance init COLOUR'"):
        routing.read()


@pytest.mark.parametrize("flag", SHARES)
def test_a_share_that_the_state_doesnt_know_is_refused(routing, flag):
    routing.switch(state(**{flag: 5}))
    routing.switch(state())
    (routing.current / flag).symlink_to("../../shares/5")

    with pytest.raises(RoutingBroken, match=f"a link {flag} that isn't the 0 %"):
        routing.read()


@pytest.mark.parametrize("said", [True, False])
def test_maintenance_against_its_flag_file_is_refused(routing, said):
    routing.switch(state(maintenance=said))
    flag = routing.current / "maintenance"
    flag.unlink() if said else flag.touch()

    with pytest.raises(RoutingBroken, match=f"says maintenance {said}"):
        routing.read()


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_a_crash_at_any_call_leaves_the_old_or_the_new_share(tmp_path, before):
    for die_at in range(1, 200):
        routing = Routing(tmp_path / str(die_at) / "routing", ("blue", "green"))
        old, _ = routing.switch(state())
        status = in_child(lambda r=routing: r.switch(state(split=2, shadow=1)), die_at, before)
        present = routing.read()
        assert present == old or (present.split, present.shadow, present.number) == (2, 1, 2), die_at
        for share in routing.shares.glob("[!.]*"):
            rest, percent = share.name.startswith("rest-"), int(share.name.removeprefix("rest-"))
            wanted = range(percent, 100) if rest else range(percent)
            assert buckets(share) == {str(bucket) for bucket in wanted}, "a named share is complete"
        for later in (state(), state(split=1, shadow=2)):
            after, _ = routing.switch(later)
            assert routing.read() == after
            assert buckets(routing.directory) <= {"current", "states", "shares"}
            assert {path.name for path in routing.shares.glob("*")} <= {"1", "2", "rest-0"}, "no rubbish stays"
        if status == 0:
            assert die_at > 55
            return
        assert status == DIED
    raise AssertionError("the switch never came to its end")


def test_a_share_is_durable_before_a_state_links_to_it(routing, monkeypatch):
    routing.switch(state())
    log = record(monkeypatch)
    routing.switch(state(split=1))
    new, shares = str(routing.shares / ".new-1"), str(routing.shares)
    steps = [
        ("fsync", f"{new}/0"),
        ("fsync", new),
        ("rename", f"{shares}/1"),
        ("fsync", shares),
        ("rename", str(routing.states / "2")),
    ]
    assert [log.index(step) for step in steps] == sorted(log.index(step) for step in steps)


def test_a_full_disk_leaves_the_old_state_and_no_rubbish(routing, monkeypatch):
    old, _ = routing.switch(state())
    real = os.link

    def full(source, path):
        if str(path).endswith(".new-5/3"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return real(source, path)

    monkeypatch.setattr(os, "link", full)
    with pytest.raises(OSError, match="No space left"):
        routing.switch(state(split=5))

    assert routing.read() == old
    assert buckets(routing.shares) == {"rest-0"}


def test_a_directory_in_place_of_a_shortcut_is_refused(routing):
    routing.switch(state())
    link = routing.current / "blue-serves"
    link.unlink()
    link.mkdir()

    with pytest.raises(RoutingBroken, match="a link blue-serves that doesn't fit"):
        routing.read()
