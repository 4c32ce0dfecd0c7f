"""Mixed load against an edge of known faults, in this process: what a run counts, and that all of it ends."""

import asyncio
import contextlib
import gc
import json
import threading
import time
from collections import Counter

import pytest
from mixed_load import MARGIN_S, MixedLoad, Tally, crossing, run_mixed_reloads, run_mixed_swaps
from swap_client import Record, Settings, Switch
from swap_runs import Completed, Host, HostError, run_swaps

VERSIONS = {"blue": "1.0.0", "green": "1.1.0"}
SLEEP_S = 0.15


class Edge:
    """Two colours behind one port. A request on `/sleep` takes longer. The old colour answers for `late_s` more."""

    def __init__(self, late_s=0.0, versions=VERSIONS):
        self.live = "blue"
        self.late_s = late_s
        self.versions = versions
        self.requests = self.accepted = 0
        self.connections = set()
        self._switched = float("-inf")

    def switch(self):
        self.live = self.idle
        self._switched = time.monotonic()
        return time.time()

    @property
    def idle(self):
        return "green" if self.live == "blue" else "blue"

    def close_connections(self):
        for writer in self.connections:
            writer.close()

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_):
        self._server.close()
        self.close_connections()

    async def _serve(self, reader, writer):
        self.connections.add(writer)
        self.accepted += 1
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(int(head.split(b"Content-Length: ")[1].split(b"\r\n")[0]))
                self.requests += 1
                colour = self.idle if time.monotonic() < self._switched + self.late_s else self.live
                closes = b"Connection: close" in head
                await asyncio.sleep(SLEEP_S if b" /sleep " in head else 0.001)
                answer = f"HTTP/1.1 200 OK\r\nX-Model-Colour: {colour}\r\nX-Model-Version: {self.versions[colour]}\r\n"
                answer += "Connection: close\r\n" if closes else ""
                writer.write(f'{answer}Content-Length: 13\r\n\r\n{{"output": 1}}'.encode())
                await writer.drain()
                if closes:
                    break
        self.connections.discard(writer)
        writer.close()


class PretendHost(Host):
    """The engine's answers, for an edge in this process. Somebody undoes swap number `undone` a moment later."""

    def __init__(self, edge, undone=None, fails=None):
        super().__init__()
        self.edge = edge
        self.undone = undone
        self.fails = fails
        self.swaps = 0

    async def run(self, *words, **_):
        begin = time.monotonic()
        answer, status = self._answer(words)
        # The engine looks through the front door before it is done.
        await asyncio.sleep(0.05 if "swap" in words else 0)
        return Completed(words, status, json.dumps(answer), "", begin, time.monotonic())

    def _answer(self, words):
        if "swap" in words:
            self.swaps += 1
            if self.swaps == self.undone:
                asyncio.get_running_loop().call_later(0.1, self.edge.switch)
            if self.swaps == self.fails:
                return {"ok": False, "changed": False, "message": "it isn't ready"}, 1
            at = self.edge.switch()
            return {"ok": True, "changed": True, "live": self.edge.live, "switched_at": at, "switch_ms": 1.5}, 0
        if "status" in words:
            colours = {name: {"status": "ready", "version": version} for name, version in VERSIONS.items()}
            return {"ok": True, "live": self.edge.live, "idle": self.edge.idle, "colours": colours}, 0
        if "history" in words:
            entries = [{"command": "rollback", "message": "the bake failed"}, {"command": "swap", "message": "swapped"}]
            return {"ok": True, "entries": entries}, 0
        self.edge.close_connections()
        return {}, 0


def settings(edge):
    common = {"url": edge.url, "timeout_s": 5, "seed": 1}
    return {
        "thinking": Settings(**common, clients=4, think_max_s=0.02),
        "closing": Settings(**common, clients=2, kind="closes", think_max_s=0.02),
        "sleeping": Settings(**common, clients=2, path="/sleep", think_max_s=0.0),
    }


def tool():
    return Tally(1, 10, 1, Counter(broken=1))


def swaps(count=4, seconds=0.8, edge=None, **host):
    """A run of swaps: its figures, the edge, and the host."""

    async def run():
        async with Edge(**edge or {}) as server:
            pretend = PretendHost(server, **host)
            load = MixedLoad(settings(server), {"tool": tool}, 0.1)
            return (await run_mixed_swaps(pretend, load, count, seconds)).as_dict(), server, pretend

    return asyncio.run(run())


def test_all_kinds_of_clients_see_every_swap():
    figures, edge, _ = swaps()
    assert (figures["made"], figures["stopped"], figures["unasked"]) == (4, None, [])
    assert 0.8 <= figures["seconds"] < 60
    for kind in figures["kinds"].values():
        assert kind["failed"] == 0 and set(kind["colours"]) == {"blue", "green"}
        assert set(kind["versions"]) == set(VERSIONS.values())
    assert sum(kind["requests"] + kind["probes"] for kind in figures["kinds"].values()) == edge.requests
    assert (figures["wrong_colour"], figures["wrong_version"]) == (0, 0)
    assert [switch["to"] for switch in figures["switches"]] == ["green", "blue", "green", "blue"]
    assert all(switch["first_new_ms"] is not None for switch in figures["switches"])
    assert figures["engine_ms"]["p99"] == 1.5 and 0 < figures["first_new_ms"]["p50"] < 1000
    # How many were under way is this machine's to say; the counting has a test of its own.
    found, well = figures["crossing"]["sleeping"]
    assert found == well
    counted = figures["tools"]["tool"]
    assert counted["failed"] == counted["failures"]["broken"] == counted["runs"] > 1
    json.dumps(figures)


def test_clients_without_a_pool_use_a_connection_for_each_request():
    async def run():
        async with Edge() as edge, MixedLoad({"closing": settings(edge)["closing"]}, {}, 0.1) as load:
            await asyncio.sleep(0.5)
        return load, edge.accepted

    load, connections = asyncio.run(run())
    assert connections == load.requests > 0 and load.failed == 0
    assert load.probed.reconnects == 0


def test_a_switch_is_seen_when_the_probe_has_seen_it():
    async def run():
        async with Edge() as edge, MixedLoad({"thinking": settings(edge)["thinking"]}, {}, 0.1) as load:
            by_others = await load.probed.first_answer_by("blue", 0, timeout_s=0.1)
            async with load.probed.probing():
                return by_others, await load.probed.first_answer_by("blue", 0, timeout_s=5)

    assert asyncio.run(run()) == (False, True)


def test_answers_of_the_old_colour_after_a_switch_are_counted_with_how_late_they_were_asked_for():
    figures, _, _ = swaps(edge={"late_s": 0.15})
    assert figures["wrong_colour"] > 0
    assert 0 < figures["wrong_colour_latest_ms"] < 151
    assert figures["wrong_colour_first"][0]["status"] == 200


def test_a_version_that_the_colour_does_not_hold_is_counted():
    figures, _, _ = swaps(count=1, seconds=0.2, edge={"versions": {"blue": "1.0.0", "green": "9.9.9"}})
    assert figures["wrong_version"] == sum(kind["versions"].get("9.9.9", 0) for kind in figures["kinds"].values()) > 0


def test_a_switch_that_nobody_asked_for_is_told_and_no_answer_is_called_wrong_for_it():
    figures, _, host = swaps(undone=2)
    assert figures["unasked"] == ["the bake failed"]
    assert (figures["made"], host.swaps, len(figures["switches"])) == (4, 4, 4)
    assert figures["wrong_colour"] == 0
    # How many were under way is this machine's to say; the counting has a test of its own.
    found, well = figures["crossing"]["sleeping"]
    assert found == well


def test_where_only_its_own_swaps_count_a_run_ends_at_somebody_elses():
    async def run():
        async with Edge() as edge:
            await run_swaps(PretendHost(edge, undone=1), settings(edge)["thinking"], 2, (0.2, 0.2))

    with pytest.raises(HostError, match="swap 2 of 2 wasn't to blue: somebody else swapped too"):
        asyncio.run(run())


def test_a_swap_that_fails_ends_the_run_which_keeps_what_was_measured():
    figures, _, _ = swaps(fails=3)
    assert figures["made"] == 2 and "it isn't ready" in figures["stopped"]
    assert figures["kinds"]["thinking"]["requests"] > 0 and figures["wrong_colour"] == 0


def test_the_control_loses_requests_of_those_who_keep_connections():
    async def run():
        async with Edge() as edge:
            load = MixedLoad(settings(edge), {}, 0.1)
            return (await run_mixed_reloads(PretendHost(edge), load, 2, 0.4, "reload nginx")).as_dict(), load.failed

    figures, failed = asyncio.run(run())
    assert figures["made"] == 2 and figures["kinds"]["thinking"]["failed"] > 0
    assert failed == sum(kind["failed"] for kind in figures["kinds"].values())
    assert "switches" not in figures


def test_an_interrupted_run_ends_its_clients_and_lets_the_tool_finish():
    ended = threading.Event()

    def slow_tool():
        time.sleep(0.3)
        ended.set()
        return Tally(1, 1)

    async def run():
        async with Edge() as edge:
            load = MixedLoad(settings(edge), {"tool": slow_tool}, 9)
            task = asyncio.create_task(run_mixed_swaps(PretendHost(edge), load, 100, 100))
            await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert ended.is_set()
            before = edge.requests
            await asyncio.sleep(0.1)
            return load, edge.requests - before

    load, later = asyncio.run(run())
    assert later == 0
    assert load.requests > 0 and load.failed == 0
    assert gc.isenabled()


def test_progress_is_told(monkeypatch, capsys):
    monkeypatch.setattr("mixed_load._TELL_EVERY_S", 0.1)
    swaps(count=2, seconds=0.3)
    assert "swaps; " in capsys.readouterr().out


# blue is live; green from 10 on; somebody switches back to blue at some time up to 20; green again from 20 on.
SWITCHES = [Switch("green", 9.9, 10.0, 10.5), Switch("blue", 10.0, 20.0, 20.0, "unasked"), Switch("green", 19, 20, 21)]


@pytest.mark.parametrize(
    ("start", "end", "colour", "failure", "counted"),
    [
        (9.0, 11.0, "blue", None, (1, 1)),
        (9.0, 11.0, "green", None, (1, 0)),
        (9.0, 11.0, None, "reset", (1, 0)),
        (9.0, 9.9, "blue", None, (0, 0)),
        (10.0 - MARGIN_S / 2, 11.0, "green", None, (0, 0)),
        (10.1, 12.0, "green", None, (0, 0)),
        (12.0, 21.0, "green", None, (0, 0)),
        (20.1, 22.0, "green", None, (0, 0)),
    ],
)
def test_requests_across_a_switch_belong_to_the_colour_of_before(start, end, colour, failure, counted):
    assert crossing([Record(0, "naive", start, end, 200, colour, "1.0.0", failure)], SWITCHES, "blue") == counted
