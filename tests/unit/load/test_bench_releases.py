"""The benchmark of bad releases without an appliance: its rows, and the releases themselves."""

import asyncio
import json
import math
from types import SimpleNamespace

import pytest
import torch
from model_server.bundle import read
from swap_runs import Completed, HostError
from user_traffic import Answer
from worse_releases import ALSO_GOOD, DIFFERING, FAILING, GOOD, NAME, RELEASES, write_release

from benchmarks import releases as bench
from benchmarks.releases import Outcome
from benchmarks.report import BenchError


def test_the_time_on_the_bad_colour_is_the_clients():
    answers = [Answer(9.0, 200, "blue"), Answer(10.0, 200, "green"), Answer(12.0, 500, ""), Answer(14.5, 500, "green")]
    row = bench.failing_row([*answers, Answer(15.0, 200, "blue")], "green", "errors")
    assert (row.value, row.unit, row.verdict) == (4.5, "s", "PASS")
    assert row.note == "2 of 5 requests failed; back for: errors"
    late = [*answers, Answer(40.5, 200, "green")]
    assert bench.failing_row(late, "green", "errors").verdict == "MISS"
    with pytest.raises(BenchError, match="no client has seen green"):
        bench.failing_row(answers[:1], "green", "errors")


@pytest.mark.parametrize(("percent", "verdict"), [(5, "PASS"), (25, "MISS"), (100, "MISS")])
def test_a_quarter_of_the_users_is_too_many(percent, verdict):
    row = bench.users_row("slow", "…", Outcome(percent, 61.4, "back for: p50"), "…")
    assert (row.verdict, row.note) == (verdict, "over after 61 s; back for: p50")


class Recorded:
    """A host whose history is the first of the given ones, and at each further look the next, up to the last."""

    def __init__(self, *histories):
        self.histories = list(histories)

    async def run(self, *words):
        entries = self.histories.pop(0) if len(self.histories) > 1 else self.histories[0]
        return Completed(words, 0, json.dumps({"entries": entries}), "", 0.0, 0.0)


def rollback(time, cause):
    return {"command": "rollback", "time": time, "cause": cause, "message": "…"}


def test_the_cause_is_that_of_the_new_rollback(monkeypatch):
    earlier, swap, new = rollback(1, "errors"), {"command": "swap"}, rollback(2, "p50")
    late = Recorded([earlier], [earlier, swap], [earlier, swap, new])
    assert asyncio.run(bench.cause_since(late, [earlier], ("p50",))) == "p50"
    # The control may go back for anything, and the entries of before may be too old to be told.
    assert asyncio.run(bench.cause_since(Recorded([new]), [earlier], ())) == "p50"
    with pytest.raises(BenchError, match="went back for 'p50'"):
        asyncio.run(bench.cause_since(Recorded([new]), [], ("shadow",)))
    # A canary that was refused went back for nothing.
    monkeypatch.setattr(bench, "_RECORD_LIMIT_S", 0.3)
    with pytest.raises(BenchError, match="no rollback is on record: green isn't ready"):
        asyncio.run(bench.cause_since(Recorded([earlier]), [earlier], ("errors",), "green isn't ready"))


def test_the_largest_share_of_users_is_that_of_this_canary():
    def canary(percent):
        return {"command": "canary", "message": f"canary: green (release 3) serves {percent} % of users"}

    before = [canary(50), rollback(1, "p50")]
    entries = [*before, canary(1), canary(5), {"command": "rollback", "message": "green serves 25 % of users"}]
    assert bench.largest_share(bench.newer(entries, before)) == 5
    assert bench.largest_share(bench.newer(entries, [])) == 50
    assert bench.largest_share([]) == 0


@pytest.mark.parametrize("live", ["blue", "green"])
@pytest.mark.parametrize("error", [HostError, KeyboardInterrupt])
def test_a_bad_release_that_nobody_watches_any_more_is_sent_back(pretend_host, monkeypatch, live, error):
    host = pretend_host()
    host.live = live

    async def lost():
        async with bench.back_where_lost(host, "blue"):
            raise error

    async def no_pause(_):
        pass

    monkeypatch.setattr(bench.asyncio, "sleep", no_pause)
    with pytest.raises(error):
        asyncio.run(lost())
    # Where abort has brought it back, a rollback would undo that.
    assert host.words == ["abort", "abort", "status", *(["rollback"] if live == "green" else [])]


def test_only_this_benchmarks_releases_are_held():
    colours = {"blue": {"model": "simplemodel", "version": GOOD}, "green": {"model": "digits", "version": GOOD}}
    status = {"live": "blue", "idle": "green", "colours": colours}
    assert (bench.held(status, "live"), bench.held(status, "idle")) == (GOOD, None)


@pytest.mark.parametrize(
    ("live", "idle", "deployed", "live_after"),
    [
        (("simplemodel", "1.0.0"), ("simplemodel", "1.1.0"), [GOOD, FAILING], "green"),
        ((NAME, ALSO_GOOD), ("digits", "1.0.0"), [FAILING], "blue"),
        ((NAME, GOOD), (NAME, FAILING), [], "blue"),
    ],
)
def test_a_bad_release_is_placed_beside_a_good_one(pretend_host, deploys, live, idle, deployed, live_after):
    deploys.host = pretend_host(live, idle, "bake")
    given = SimpleNamespace(deploy_command="deploy")
    assert asyncio.run(bench.place(deploys.host, given, FAILING))[0] == live_after
    assert deploys.versions == deployed
    assert deploys.host.colours[deploys.host.idle] == (NAME, FAILING)


@pytest.mark.parametrize("version", RELEASES)
def test_a_release_is_a_bundle_whose_examples_dont_tell(tmp_path, version):
    (tmp_path / "again").mkdir()
    bundle, again = write_release(tmp_path, version), write_release(tmp_path / "again", version)
    assert all((again / path.name).read_bytes() == path.read_bytes() for path in bundle.iterdir())
    assert read(bundle).version == version
    scope = {"__name__": "model"}
    exec((bundle / "model.py").read_text(), scope)
    model = scope["SimpleModel"](hidden=16, **RELEASES[version] | {"seconds": 0})
    rows = torch.tensor([[0.2, 0.6], [0.95, 0.5]])
    if version == FAILING:
        model(rows[:1])
        with pytest.raises(ValueError):
            model(rows)
        return
    with torch.inference_mode():
        plain, answers = model.layers(rows).flatten().tolist(), model(rows).flatten().tolist()
    differs = [not math.isclose(a, b) for a, b in zip(answers, plain, strict=True)]
    assert differs == [False, version == DIFFERING]
