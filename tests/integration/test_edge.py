"""nginx as the role configures it: who answers a request, by the routing state alone and without a reload."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from edge_box import WORKERS, Edge, Listener, answer
from swap_client import Settings, SwapLoad, Switch, summarise

pytestmark = pytest.mark.needs("nginx")

NO_CONTENT = b"HTTP/1.1 204 No Content\r\n\r\n"
OTHER = {"blue": "green", "green": "blue"}


def colour(found):
    """Who answered, and that nobody else is named."""
    assert found.status == 200, found.body
    said = json.loads(found.body)["colour"]
    assert found.headers["x-model-colour"] == said
    return said


def error(found):
    """The message of an error that nginx itself answered."""
    assert found.headers["content-type"] == "application/json"
    assert "x-model-colour" not in found.headers
    assert found.headers["x-request-id"]
    return json.loads(found.body)["error"]


def colours_of(edge, users):
    with edge.connection() as connection:
        return {user: colour(edge.ask(headers={"X-User-Id": user}, connection=connection)) for user in users}


def logged(edge, found, environment="prod"):
    """The line of the access log that tells of an answer."""
    lines = []

    def there():
        lines[:] = [line for line in edge.log(environment) if line["request_id"] == found.headers["x-request-id"]]
        return lines

    # A line is written when all of the request is over, the copy of it included.
    wait_for(there)
    assert len(lines) == 1
    return lines[0]


def wait_for(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


@pytest.mark.parametrize("live", ["blue", "green"])
def test_the_live_colour_and_the_idle_one(edge, live):
    edge.route(live)

    assert {colour(edge.ask()) for _ in range(20)} == {live}
    tested = edge.ask("/test/predict?top=3")
    assert colour(tested) == OTHER[live]
    assert json.loads(tested.body)["path"] == "/predict?top=3"
    for path, wanted in (("/health", live), ("/test/health", OTHER[live])):
        about = json.loads(edge.ask(path, method="GET").body)
        assert (about["colour"], about["socket"], about["path"]) == (wanted, "control", "/health")


def test_no_colour_is_live(edge):
    edge.routing.clear()

    for path in ("/predict", "/test/predict", "/health", "/test/health"):
        found = edge.ask(path)
        assert found.status == 503
        assert found.headers["retry-after"] == "1"
        assert error(found).startswith("No colour is live")


def test_a_split_of_requests_that_name_no_user(edge):
    edge.route("blue", split=5)

    with edge.connection() as connection:
        found = Counter(colour(edge.ask(connection=connection)) for _ in range(4000))

    # 200 are expected; this is six standard deviations to each side.
    assert 117 < found["green"] < 283


def test_a_user_stays_with_a_colour(edge):
    users = [f"user-{number}" for number in range(100)]
    edge.route("blue", split=25)
    first = colours_of(edge, users)
    assert 5 < Counter(first.values())["green"] < 50
    for _ in range(3):
        assert colours_of(edge, users) == first

    edge.route("blue", split=50)
    wider = colours_of(edge, users)
    assert [user for user in users if first[user] == "green" and wider[user] == "blue"] == []
    assert Counter(wider.values())["green"] > Counter(first.values())["green"]

    edge.route("blue", split=100)
    assert set(colours_of(edge, users).values()) == {"green"}


def test_a_split_is_of_the_idle_colour(edge):
    users = [f"user-{number}" for number in range(50)]
    edge.route("blue", split=40)
    before = colours_of(edge, users)
    edge.route("green", split=40)

    assert colours_of(edge, users) == {user: OTHER[before[user]] for user in users}


@pytest.mark.parametrize("split", [0, 100])
@pytest.mark.parametrize(
    ("headers", "track"),
    [
        ({"X-Model-Track": "idle"}, "idle"),
        ({"X-Model-Track": "live"}, "live"),
        ({"Cookie": "a=b; model_track=idle"}, "idle"),
        ({"Cookie": "model_track=live"}, "live"),
        ({"X-Model-Track": "live", "Cookie": "model_track=idle"}, "live"),
        ({"X-Model-Track": "idle", "Cookie": "model_track=live"}, "idle"),
        ({"X-Model-Track": "green", "Cookie": "model_track=live"}, "live"),
        ({"X-Model-Track": "green", "Cookie": "model_track=green"}, None),
    ],
)
def test_a_request_chooses_for_itself(edge, split, headers, track):
    edge.route("blue", split=split)
    drawn = "idle" if split else "live"

    assert colour(edge.ask(headers=headers)) == {"live": "blue", "idle": "green"}[track or drawn]


@pytest.mark.parametrize("live", ["blue", "green"])
def test_one_look_says_who_serves(edge, live):
    users = [f"user-{number}" for number in range(50)]
    edge.route(live, split=25)
    before = colours_of(edge, users)
    assert set(before.values()) == {"blue", "green"}
    # What all other requests go by.
    others = [edge.routing.current / live, edge.routing.current / "split"]
    for path in others:
        path.rename(f"{path}-hidden")

    try:
        assert colours_of(edge, users) == before
        assert edge.ask(headers={"X-Model-Track": "live"}).status == 503
    finally:
        for path in others:
            Path(f"{path}-hidden").rename(path)


def test_maintenance(edge):
    edge.route("blue", maintenance=True)

    for headers in ({}, {"X-Model-Track": "green"}):
        found = edge.ask(headers=headers)
        assert found.status == 503
        assert found.headers["retry-after"]
        assert "maintenance" in error(found)
    # Who asks for a track knows what they do.
    assert colour(edge.ask(headers={"X-Model-Track": "live"})) == "blue"
    assert colour(edge.ask(headers={"X-Model-Track": "idle"})) == "green"
    assert colour(edge.ask("/test/predict")) == "green"
    assert colour(edge.ask("/health", method="GET")) == "blue"
    assert colour(edge.ask("/test/health", method="GET")) == "green"

    edge.route("blue")
    assert colour(edge.ask()) == "blue"


def test_requests_are_copied_as_they_were_sent(edge):
    edge.route("blue", shadow=100)
    copies = []
    sent = [("POST", f"/predict?number={number}", b'{"data": [%d]}' % number) for number in range(10)]
    sent += [("GET", f"/v2//models/{number}%20", b"") for number in range(10)]
    sent.append(("PUT", "/sent/in/chunks", b"x" * 1000))

    with edge.shadow(lambda request: copies.append(request) or NO_CONTENT):
        for method, path, body in sent:
            headers = {"X-User-Id": "somebody", "X-Request-ID": "follow-me", "Content-Type": "application/json"}
            chunks = iter([body[:300], body[300:]]) if method == "PUT" else body
            assert colour(edge.ask(path, headers, method, chunks)) == "blue"
        assert colour(edge.ask("/test/predict")) == "green"
        assert edge.ask("/health", method="GET").status == 200
        wait_for(lambda: len(copies) == len(sent))

    assert {(copy.method, copy.headers["x-shadow-path"], copy.body) for copy in copies} == set(sent)
    for copy in copies:
        assert copy.headers["x-user-id"] == "somebody"
        assert copy.headers["x-request-id"] == "follow-me"
        assert copy.headers["content-type"] == "application/json"
        assert copy.headers["host"] == "127.0.0.1"
        assert copy.headers.get("connection") != "close"


def test_a_large_body_is_copied_too(edge):
    edge.route("blue", shadow=100)
    copies = []
    body = b"x" * 3_000_000

    with edge.shadow(lambda request: copies.append(request) or NO_CONTENT):
        assert json.loads(edge.ask(body=body).body)["body"] == len(body)
        wait_for(lambda: copies)

    assert copies[0].body == body


def test_a_share_of_requests_is_copied(edge):
    edge.route("blue", shadow=20)
    copies = []

    with edge.shadow(lambda request: copies.append(request) or NO_CONTENT), edge.connection() as connection:
        for _ in range(500):
            assert colour(edge.ask(headers={"X-User-Id": "one"}, connection=connection)) == "blue"

    # 100 are expected; this is six standard deviations to each side.
    assert 46 < len(copies) < 154


def test_both_colours_requests_are_copied(edge):
    edge.route("blue", split=50, shadow=100)
    users = [f"user-{number}" for number in range(20)]
    copies = []

    with edge.shadow(lambda request: copies.append(request) or NO_CONTENT):
        assert set(colours_of(edge, users).values()) == {"blue", "green"}
        wait_for(lambda: len(copies) == len(users))


@contextlib.contextmanager
def reads_and_never_answers(edge):
    end = threading.Event()
    with edge.shadow(lambda request: end.wait(30) and NO_CONTENT):
        yield
        end.set()


@contextlib.contextmanager
def never_reads(edge):
    path = edge.run / "shadow" / "shadow.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(128)
        yield
    path.unlink()


@pytest.mark.parametrize("hanging", [reads_and_never_answers, never_reads])
def test_a_shadow_that_hangs_delays_a_connections_next_request_by_100_ms(edge, hanging):
    edge.route("blue", shadow=100)

    with hanging(edge), edge.connection() as connection:
        begin = time.monotonic()
        for size in (2, 2_000_000, 2, 2):
            assert json.loads(edge.ask(body=b"x" * size, connection=connection).body)["body"] == size
        seconds = time.monotonic() - begin

    # Three requests came after another, and a busy machine takes its time.
    assert seconds < 1.5


def test_a_shadow_that_isnt_there_changes_nothing(edge):
    edge.route("blue", shadow=100)

    with edge.connection() as connection:
        assert [colour(edge.ask(connection=connection)) for _ in range(50)] == ["blue"] * 50


@pytest.mark.parametrize("status", ["500 Internal Server Error", "503 Service Unavailable"])
def test_what_a_shadow_answers_changes_nothing(edge, status):
    edge.route("blue", shadow=100)

    with edge.shadow(lambda request: answer(status, {})), edge.connection() as connection:
        assert [colour(edge.ask(connection=connection)) for _ in range(20)] == ["blue"] * 20


@pytest.mark.parametrize("shadow", [0, 100])
def test_errors_are_json(edge, colours, shadow):
    edge.route("blue", split=100, shadow=shadow)
    too_large = b"x" * (8 * 1024 * 1024 + 1)

    with edge.shadow(lambda request: NO_CONTENT):
        with colours["green"].down():
            found = edge.ask()
            assert found.status == 502
            assert found.headers["retry-after"] == "1"
            assert error(found).startswith("The colour is not up")
            assert colour(edge.ask(headers={"X-Model-Track": "live"})) == "blue"
        # The second one is sent in chunks, so that its length isn't known from the start.
        for body in (too_large, iter([too_large])):
            found = edge.ask(body=body)
            assert found.status == 413
            assert "8388608 bytes" in error(found)
        assert colour(edge.ask()) == "green"


def test_the_log_says_where_a_request_was_sent(edge, colours):
    def said(path="/predict", headers=None):
        line = logged(edge, edge.ask(path, headers), "test" if path.startswith("/test") else "prod")
        return line["status"], line["routed"], line["colour"]

    assert said() == (200, "blue", "blue")
    assert said(headers={"X-Model-Track": "idle"}) == (200, "green", "green")
    assert said("/test/predict") == (200, "green", "green")
    assert said("/health", {"X-Model-Track": "idle"}) == (200, "blue", "blue")
    edge.route("blue", split=100, shadow=100)
    assert said() == (200, "green", "green")
    assert said("/health") == (200, "blue", "blue")
    with colours["blue"].down():
        assert said(headers={"X-Model-Track": "live"}) == (502, "blue", "")
    # What was sent nowhere is no colour's fault.
    edge.route("blue", maintenance=True)
    assert said() == (503, "", "")
    edge.routing.clear()
    assert said() == (503, "", "")
    assert said("/test/predict") == (503, "", "")


def test_what_may_be_personal_is_in_no_log(edge, colours):
    headers = {"Referer": "https://clinic.example/Bertha"}

    def ask(path="/predict", **more):
        return edge.ask(f"{path}?patient=Alice", headers, **more)

    assert ask().status == 200
    too_large = b"x" * (8 * 1024 * 1024 + 1)
    for body in (too_large, iter([too_large])):
        assert ask(body=body).status == 413
    # Nobody takes the copies, either.
    edge.route("blue", shadow=100)
    with colours["blue"].down(), colours["green"].down():
        for path in ("/predict", "/test/predict", "/health"):
            found = ask(path)
            assert found.status == 502
    edge.routing.clear()
    assert ask().status == 503
    with edge.connection() as connection:
        last = edge.ask("/test/predict?patient=Alice", headers, connection=connection)
    logged(edge, last, "test")

    for path in (edge.directory / "log").iterdir():
        text = path.read_text()
        assert "Alice" not in text and "Bertha" not in text, path


# A loss that comes only now and then is a loss: no second try.
@pytest.mark.flaky(reruns=0)
@pytest.mark.parametrize("more", [{}, {"shadow": 30}], ids=["plain", "shadowed"])
def test_no_request_is_lost_in_a_swap(edge, more):
    settings = Settings(
        url=f"http://127.0.0.1:{edge.port}", clients=20, think_max_s=0.02, answer_key="colour", max_duration_s=60
    )

    async def swap_under_load():
        switches = []
        async with SwapLoad(settings) as load:
            for number in range(20):
                await asyncio.sleep(0.05)
                to = ("green", "blue")[number % 2]
                async with load.probing():
                    begin = time.monotonic()
                    instant = await asyncio.to_thread(edge.route, to, **more)
                    switches.append(Switch(to, begin, instant, instant))
                    assert await load.first_answer_by(to, instant, timeout_s=10)
        return summarise(load, switches, "blue")

    with edge.shadow(lambda request: NO_CONTENT):
        summary = asyncio.run(swap_under_load())

    assert summary.failures == {}
    assert summary.reconnects == 0
    assert summary.wrong_colour == 0
    assert summary.requests > 200


@pytest.fixture
def short_directory():
    # As for the edge that the other tests share.
    with tempfile.TemporaryDirectory(prefix="edge-", dir="/tmp") as directory:
        yield Path(directory)


@contextlib.contextmanager
def workers_that(run, answers):
    """The live colour's workers do so with every request; yields those that they got."""
    got = []

    def took(request):
        got.append(request)
        return answers(request)

    with contextlib.ExitStack() as stack:
        for number in range(WORKERS):
            stack.callback(Listener(run / "blue" / f"worker-{number}.sock", took).stop)
        yield got


def dies(_):
    raise ConnectionAbortedError


@pytest.mark.parametrize(("method", "takers"), [("POST", 1), ("PUT", WORKERS)])
def test_who_gets_a_request_that_kills_workers(edge, colours, method, takers):
    """nginx can't be kept from sending a PUT again; the runbook of workers that restart says so."""
    with colours["blue"].down(), workers_that(edge.run, dies) as got:
        found = edge.ask("/predictions/simplemodel", method=method)
        assert found.status == 502 and error(found)
    assert len(got) == takers
    assert len(logged(edge, found)["upstream"].split(", ")) == takers


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_a_worker_that_cannot_be_reached_costs_no_request(edge, colours, method):
    with colours["blue"].down():
        ready = Listener(edge.run / "blue" / "worker-1.sock", lambda _: NO_CONTENT)
        try:
            assert {edge.ask("/predictions/simplemodel", method=method).status for _ in range(6)} == {204}
        finally:
            ready.stop()


def test_a_request_that_hangs_takes_no_second_worker(short_directory):
    edge = Edge(short_directory)
    edge.configuration, shorter = re.subn(r"proxy_read_timeout \d+s;", "proxy_read_timeout 1s;", edge.configuration)
    assert shorter == 1
    edge.route("blue")
    over = threading.Event()

    def hangs(_):
        over.wait()
        raise ConnectionAbortedError

    with edge.running(), workers_that(edge.run, hangs) as got:
        try:
            for number, method in enumerate(("POST", "PUT"), 1):
                assert edge.ask("/predictions/simplemodel", method=method).status == 504
                assert len(got) == number
        finally:
            over.set()
