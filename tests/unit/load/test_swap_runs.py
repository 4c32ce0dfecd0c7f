"""Commands on the host, and how a switch's instant is taken from what `swap --json` printed."""

import asyncio
import json
import time

import pytest
from swap_client import monotonic_from_wall
from swap_runs import SWITCHED_AT_KEY, Completed, Host, HostError, link_changed_at, settled_status, switch_from


def completed(answer, seconds=0.5):
    end = time.monotonic()
    return Completed(("swap",), 0, f"some text\n{json.dumps(answer)}\n", "", end - seconds, end)


def test_the_instant_is_the_hosts_where_the_clocks_agree():
    wall = time.time() - 0.2

    switch = switch_from(completed({SWITCHED_AT_KEY: wall, "switch_ms": 3.5}), "green")

    assert switch.source == "reported"
    assert switch.instant == pytest.approx(monotonic_from_wall(wall), abs=0.01)
    assert switch.reported_ms == 3.5
    assert switch.begin < switch.instant < switch.done


@pytest.mark.parametrize("answer", [{}, {SWITCHED_AT_KEY: None}, {SWITCHED_AT_KEY: "now"}, {SWITCHED_AT_KEY: 1e9}])
def test_an_unknown_or_impossible_instant_is_the_commands_start(answer):
    switch = switch_from(completed(answer), "green")

    assert switch.source == "begin"
    assert switch.instant == switch.begin


def test_the_links_change_time_stands_in_for_an_instant_that_is_not_reported():
    wall = time.time() - 0.2

    switch = switch_from(completed({}), "green", link_changed=wall)

    assert switch.source == "link"
    assert switch.instant == pytest.approx(monotonic_from_wall(wall), abs=0.01)
    assert switch_from(completed({SWITCHED_AT_KEY: wall - 0.1}), "green", wall).source == "reported"
    assert switch_from(completed({}), "green", link_changed=wall - 60).source == "begin"


def test_the_links_change_time_is_that_of_the_rename(tmp_path, monkeypatch):
    class WithoutSudo(Host):
        async def run(self, *words, **more):
            return await super().run(*words[1:], **more)

    link, new = tmp_path / "current", tmp_path / "new"
    new.symlink_to("states/1")
    time.sleep(0.05)
    before = time.time()
    new.rename(link)
    monkeypatch.setattr("swap_runs.ROUTING_LINK", str(link))

    assert asyncio.run(link_changed_at(WithoutSudo())) == pytest.approx(before, abs=0.02)
    link.unlink()
    assert asyncio.run(link_changed_at(WithoutSudo())) is None


def test_json_is_the_last_line():
    assert completed({"ok": True}).json() == {"ok": True}
    with pytest.raises(HostError, match="no JSON object"):
        Completed(("x",), 1, "", "denied", 0, 1).json()
    with pytest.raises(HostError, match="no JSON object"):
        Completed(("x",), 1, "{}\n[1]", "", 0, 1).json()


def test_commands_go_through_the_prefix():
    done = asyncio.run(Host("env LC_ALL=C").run("printf", "%s", "a b"))

    assert done.stdout == "a b"
    assert done.begin <= done.end


def test_a_failed_command_says_what_it_printed():
    with pytest.raises(HostError, match="exit status 3.*no such thing"):
        asyncio.run(Host().run("sh", "-c", "echo no such thing >&2; exit 3"))
    assert asyncio.run(Host().run("false", check=False)).returncode == 1
    with pytest.raises(HostError, match="no-such-program"):
        asyncio.run(Host().run("no-such-program"))


def test_a_command_that_hangs_is_ended_with_its_children():
    begin = time.monotonic()
    with pytest.raises(HostError, match="not done after"):
        asyncio.run(Host().run("sh", "-c", "sleep 60 & wait", timeout_s=0.2))
    assert time.monotonic() - begin < 5


@pytest.mark.parametrize(
    ("status", "named"),
    [
        ({"live": None, "idle": None, "colours": {}}, "None"),
        ({"live": "blue", "idle": "green", "colours": {"blue": {"status": "ready"}, "green": {}}}, "green"),
    ],
)
def test_swaps_are_not_measured_without_two_ready_colours(status, named):
    class Pretend(Host):
        async def status(self):
            return status

    with pytest.raises(HostError, match=f"ready before swaps are measured, but {named}"):
        asyncio.run(settled_status(Pretend()))
