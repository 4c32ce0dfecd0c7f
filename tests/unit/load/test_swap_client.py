"""The load client against a small server whose faults are known, so that its counts can be checked."""

import asyncio
import contextlib
import json
import time

import pytest
import swap_client
from swap_client import Record, Settings, SwapLoad, Switch, describe_switches, percentile, summarise, wrong_colour

GOOD = (
    b'HTTP/1.1 200 OK\r\nContent-Length: 16\r\nX-Model-Colour: blue\r\nX-Model-Version: 1.0.0\r\n\r\n{"output": 0.65}'
)


class Server:
    """Answers each request with `answer`, then does what `after` says with the connection."""

    def __init__(self, answer=GOOD, after="keep", delay_s=0.0):
        self.answer = answer
        self.after = after
        self.delay_s = delay_s
        self.connections = 0
        self.requests = 0

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        return self

    async def __aexit__(self, *_):
        self._server.close()

    async def _serve(self, reader, writer):
        self.connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    int(v) for k, _, v in (h.partition(b":") for h in head.split(b"\r\n")) if k == b"Content-Length"
                )
                self.body = await reader.readexactly(length)
                self.requests += 1
                if self.after == "silence":
                    await asyncio.sleep(60)
                await asyncio.sleep(self.delay_s)
                writer.write(self.answer)
                await writer.drain()
                if self.after == "close":
                    break
        writer.close()


def load(server_arguments, seconds=0.4, **settings):
    """Run a load against a server for `seconds`; the finished load's summary and the server."""

    async def run():
        async with Server(**server_arguments) as server:
            given = {"clients": 3, "think_max_s": 0.02, "timeout_s": 5, "seed": 1, **settings}
            async with SwapLoad(Settings(url=server.url, **given)) as running:
                await asyncio.sleep(seconds)
            return summarise(running), server

    return asyncio.run(run())


def test_a_client_keeps_one_connection_and_every_answer_is_counted():
    summary, server = load({})

    assert server.connections == 3
    assert summary.requests == server.requests > 20
    assert summary.failed == 0
    assert summary.reconnects == 0
    assert summary.colours == {"blue": summary.requests}
    assert summary.versions == {"1.0.0": summary.requests}
    assert json.loads(server.body) == {"data": [0.2, 0.6]}


def test_naive_counts_a_connection_closed_while_idle_as_a_failed_request():
    summary, server = load({"after": "close"})

    # Every answer is followed by a close, so each connection has one good answer and one loss.
    assert summary.failed == summary.lost() > 5
    assert set(summary.failures) <= {"reset", "closed before the answer"}
    assert summary.requests - summary.failed == server.requests
    assert summary.reconnects >= summary.failed - 3


def test_checks_eof_opens_another_connection_and_loses_nothing():
    summary, server = load({"after": "close"}, kind="checks_eof", think_max_s=0.04)

    # The close can still come between the look and the write, on a busy machine: that is what a real pool has too.
    assert summary.reconnects > 5
    assert summary.failed <= summary.reconnects // 5
    assert server.connections == summary.reconnects + 3


def test_a_close_that_the_server_announced_is_no_loss():
    answer = GOOD.replace(b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nConnection: close\r\n")

    summary, _ = load({"answer": answer, "after": "close"})

    assert summary.failed == 0
    assert summary.reconnects > 5


def test_a_server_that_never_answers_is_a_timeout():
    summary, _ = load({"after": "silence"}, seconds=0.3, timeout_s=0.1)

    assert summary.failed == summary.requests >= 3
    assert summary.failures == {"timeout": summary.failed}


def test_nobody_listening_is_a_refusal_and_no_busy_loop():
    async def run():
        async with Server() as server:
            pass
        async with SwapLoad(Settings(url=server.url, clients=1, think_max_s=0)) as running:
            await asyncio.sleep(0.3)
        return summarise(running)

    summary = asyncio.run(run())

    assert summary.failures == {"connect: ECONNREFUSED": summary.requests}
    assert summary.requests < 20


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (GOOD.replace(b"200 OK", b"502 Bad Gateway"), "status 502"),
        (GOOD.replace(b'"output"', b'"outfit"'), "answer without 'output'"),
        (GOOD.replace(b'{"output": 0.65}', b"<html>no</html>."), "answer isn't JSON"),
        (GOOD + b"more", "malformed answer: more bytes than announced"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "malformed answer: 'SSH-2.0-OpenSSH'"),
    ],
)
def test_a_bad_answer_is_a_failed_request(answer, reason):
    summary, _ = load({"answer": answer}, seconds=0.15)

    assert summary.requests > 0
    assert summary.failures == {reason: summary.requests}


def test_an_answer_cut_short_is_a_failed_request():
    summary, _ = load({"answer": GOOD[:-4], "after": "close"}, seconds=0.15)

    assert summary.failures == {"closed inside the answer": summary.requests}


def test_a_chunked_answer_is_read_whole():
    head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nX-Model-Colour: green\r\n\r\n"

    summary, server = load({"answer": head + b'9\r\n{"output"\r\n7;x=y\r\n: 0.65}\r\n0\r\n\r\n'})

    assert summary.failed == 0
    assert summary.colours == {"green": summary.requests}
    assert server.connections == 3


def test_probes_are_sent_only_while_probing_and_counted_apart():
    async def run():
        async with Server() as server:
            async with SwapLoad(Settings(url=server.url, clients=0)) as running:
                await asyncio.sleep(0.05)
                before = len(running.records)
                async with running.probing():
                    assert await running.first_answer_by("blue", time.monotonic(), 2)
                    assert not await running.first_answer_by("green", 0, 0.1)
            return before, summarise(running)

    before, summary = asyncio.run(run())

    assert before == 0
    assert summary.probes > 20
    assert summary.requests == 0


def test_the_load_ends_by_itself():
    async def run():
        async with Server() as server, SwapLoad(Settings(url=server.url, clients=2, max_duration_s=0.1)) as running:
            await asyncio.sleep(0.2)
            sent = len(running.records)
            await asyncio.sleep(0.2)
            return running.stopping, sent, len(running.records)

    stopping, sent, later = asyncio.run(run())

    assert stopping
    assert sent == later


def test_stopping_waits_for_requests_in_flight_but_not_for_thinkers():
    begin = time.monotonic()

    summary, _ = load({}, seconds=0.1, think_max_s=30)

    assert time.monotonic() - begin < 2
    assert summary.failed == 0


def test_requests_in_flight_when_the_load_stops_are_finished_and_counted():
    summary, server = load({"delay_s": 0.2}, seconds=0.1, think_max_s=0)

    assert summary.requests == server.requests == 3
    assert summary.failed == 0


@pytest.mark.parametrize("url", ["http://192.0.2.1:8080", "http://example.org", "https://127.0.0.1", "127.0.0.1:80"])
def test_load_goes_to_loopback_only(url):
    with pytest.raises(ValueError, match="loopback"):
        SwapLoad(Settings(url=url))


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="naive, checks_eof"):
        SwapLoad(Settings(kind="hasty"))


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        (range(1, 101), 0.50, 50),
        (range(1, 101), 0.95, 95),
        (range(1, 101), 0.99, 99),
        (range(1, 101), 1.0, 100),
        (range(100, 0, -1), 0.99, 99),
        ([7.0], 0.5, 7.0),
        ([1, 2, 3], 0.5, 2),
        ([1, 2, 3, 4], 0.5, 2),
        (range(20), 0.95, 18),
        ([], 0.5, None),
    ],
)
def test_percentiles_are_nearest_ranks(values, share, expected):
    assert percentile(values, share) == expected


def record(start, end, colour, failure=None):
    return Record(0, "naive", start, end, 200, colour, "1.0.0", failure)


# blue is live; the swap to green runs from 10.0 to 10.5, its rename at 10.2; the swap back from 20.0 to 20.5.
SWITCHES = [Switch("green", 10.0, 10.2, 10.5), Switch("blue", 20.0, 20.2, 20.5)]


@pytest.mark.parametrize(
    ("start", "end", "colour", "wrong"),
    [
        (1.0, 1.1, "blue", False),
        (1.0, 1.1, "green", True),
        (9.9, 10.3, "blue", False),
        (9.9, 10.3, "green", False),
        (9.9, 11.0, "blue", False),
        (10.3, 10.4, "blue", False),
        (10.49, 12.0, "blue", False),
        (10.5, 10.6, "blue", True),
        (10.6, 10.7, "blue", True),
        (10.6, 10.7, "green", False),
        (19.9, 20.3, "blue", False),
        (19.0, 19.9, "blue", True),
        (20.6, 20.7, "green", True),
        (20.6, 20.7, "blue", False),
        (20.6, 20.7, None, True),
        (20.6, 20.7, "red", True),
    ],
)
def test_an_answer_is_wrong_when_its_colour_was_live_at_no_time_of_the_request(start, end, colour, wrong):
    assert bool(wrong_colour([record(start, end, colour)], SWITCHES, "blue")) is wrong


def test_a_failed_request_has_no_wrong_colour():
    assert wrong_colour([record(10.6, 10.7, "blue", "status 500")], SWITCHES, "blue") == []


def test_what_the_clients_saw_of_each_switch():
    records = [
        record(9.0, 9.1, "blue"),
        # In flight through both switches: an old answer of blue's, not the first after the second switch.
        record(9.5, 20.05, "blue"),
        record(10.15, 10.35, "blue"),
        record(10.19, 10.206, "green"),
        record(10.21, 10.22, "green"),
        record(10.3, 10.4, "blue"),
        record(10.7, 10.8, "blue"),
        record(20.1, 20.19, "green"),
        record(20.21, 20.25, "blue"),
        record(25.0, 25.1, "blue", "status 502"),
    ]

    to_green, to_blue = describe_switches(records, SWITCHES, "blue")

    assert to_green["first_new_ms"] == pytest.approx(6, abs=0.01)
    assert to_green["last_old_start_ms"] == pytest.approx(500, abs=0.01)
    assert to_green["old_after_instant"] == 2
    assert to_green["wrong_after_done"] == 1
    assert to_blue["first_new_ms"] == pytest.approx(50, abs=0.01)
    assert to_blue["last_old_start_ms"] == pytest.approx(-100, abs=0.01)
    assert to_blue["old_after_instant"] == to_blue["wrong_after_done"] == 0


def test_a_switch_that_nobody_saw_has_no_first_answer():
    (seen,) = describe_switches([record(1, 2, "blue")], SWITCHES[:1], "blue")

    assert seen["first_new_ms"] is None


def test_wall_instants_become_monotonic_ones():
    assert swap_client.monotonic_from_wall(time.time() + 5) == pytest.approx(time.monotonic() + 5, abs=0.05)


def test_switches_are_read_from_a_file(tmp_path):
    now = time.time()
    path = tmp_path / "switches.json"
    path.write_text(json.dumps([{"to": "green", "at": now, "done": now + 1}, {"to": "blue", "at": now + 2}]))

    first, second = swap_client.read_switches(path)

    assert (first.to, second.to) == ("green", "blue")
    assert first.done - first.instant == pytest.approx(1, abs=0.01)
    assert second.done == pytest.approx(second.instant, abs=0.01)


def test_the_command_prints_figures_and_fails_on_losses(tmp_path, capsys):
    async def run(after):
        async with Server(after=after) as server:
            words = ["--url", server.url, "--clients", "2", "--duration", "0.2", "--think-max-ms", "10"]
            return await asyncio.to_thread(swap_client.main, [*words, "--json", str(tmp_path / "out" / "figures.json")])

    assert asyncio.run(run("keep")) == 0
    assert json.loads((tmp_path / "out" / "figures.json").read_text())["failed"] == 0
    assert asyncio.run(run("close")) == 1
    assert "failed" in capsys.readouterr().out


def test_the_command_refuses_other_machines(capsys):
    with pytest.raises(SystemExit) as error:
        swap_client.main(["--url", "http://192.0.2.1"])

    assert error.value.code == 2
    assert "loopback" in capsys.readouterr().err
