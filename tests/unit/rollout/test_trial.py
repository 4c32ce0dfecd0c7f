"""What a look of the watch finds: in the access log, in the shadow's counts, and with requests of its own."""

from __future__ import annotations

import json
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from rollout import config, host, plan, watch
from rollout.judge import FAIL, NO_DATA, PASS
from rollout.watch import Trial
from rollout_stand_ins import serve, wait_for


@pytest.fixture
def canary(box):
    """Release 2 on green beside release 1, which is live on blue; nobody but the test sends anything."""
    box.configure(synthetic_per_second=0, canary_step_seconds=60, bake_seconds=60)
    box.live_on_blue()
    return box


def begin(box, *more):
    assert box.run("swap", "--strategy", "canary", "--detach", "--steps", "50,100", *more).status == 0
    return closing(Trial(config.load(box.config), plan.read(box.state_dir / "rollout.json")))


def write(box, colour, count, seconds=0.02, status=200, ahead=0, path="/predict"):
    moment = datetime.now(UTC) + timedelta(days=ahead)
    about = {"time": moment.isoformat(), "method": "POST", "path": path, "request_id": "r", "routed": colour}
    line = json.dumps({**about, "status": status, "request_seconds": seconds, "upstream_seconds": str(seconds)})
    with box.door.access_log.open("a") as stream:
        stream.write(f"{line}\n" * count)


def look(trial):
    return {check.name: check for check in trial.look()}


@pytest.mark.parametrize(("served", "gave_up"), [(0, 3), (100, 10), (2000, 100)])
def test_a_colour_on_which_clients_give_up_fails(canary, served, gave_up):
    with begin(canary) as trial:
        write(canary, "blue", 500)
        write(canary, "green", served)
        write(canary, "green", gave_up, seconds=2.0, status=499)
        found = look(trial)["errors"]
    assert found.verdict == FAIL and f"{gave_up} of them because clients gave up" in found.text, found


def test_a_colour_that_refuses_its_clients_fails(canary):
    with begin(canary) as trial:
        write(canary, "blue", 500)
        write(canary, "green", 100)
        assert look(trial)["refused"].verdict == PASS
        write(canary, "green", 100, status=400)
        found = look(trial)["refused"]
    assert found.verdict == FAIL and "100 of 200 requests refused" in found.text, found


@pytest.mark.parametrize("days", [1, -1])
def test_a_clock_that_jumps_hides_nothing(canary, monkeypatch, days):
    real = time.time
    with begin(canary) as trial:
        for colour in ("blue", "green"):
            write(canary, colour, 100)
        assert look(trial)["errors"].verdict == PASS
        monkeypatch.setattr(time, "time", lambda: real() + days * 86400)
        write(canary, "blue", 100, ahead=days)
        write(canary, "green", 50, ahead=days, status=500)
        found = look(trial)
        # All of it happened within the window, whatever the clock said.
        assert found["errors"].verdict == FAIL and "50 of 150" in found["errors"].text, found
        assert trial.elapsed < 60


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_clients_that_change_their_mind_condemn_nobody(canary, share):
    with begin(canary) as trial:
        write(canary, "blue", 500)
        write(canary, "green", 500)
        write(canary, "green", int(500 * share), seconds=0.05, status=499)
        write(canary, "green", int(500 * share), seconds=0.2, status=499)
        assert look(trial)["errors"].verdict == PASS


def test_clients_that_give_up_on_both_colours_condemn_nobody(canary):
    with begin(canary) as trial:
        for colour in ("blue", "green"):
            write(canary, colour, 500)
            write(canary, colour, 50, seconds=2.0, status=499)
        assert look(trial)["errors"].verdict == PASS


def test_to_wait_for_a_slow_model_isnt_to_give_up(canary):
    with begin(canary) as trial:
        for colour in ("blue", "green"):
            write(canary, colour, 500, seconds=1.5)
        write(canary, "green", 100, seconds=3.0, status=499)
        assert look(trial)["errors"].verdict == PASS
        write(canary, "green", 100, seconds=4.6, status=499)
        assert look(trial)["errors"].verdict == FAIL


def test_what_failed_while_it_started_condemns_nobody(canary):
    with begin(canary) as trial:
        for colour in ("blue", "green"):
            canary.host.stop(colour)
        assert look(trial)["health"].verdict == NO_DATA
        # Between two looks: it fails still, and is ready.
        write(canary, "green", 20, status=502)
        for colour in ("blue", "green"):
            canary.host.start(colour)
        for colour in ("blue", "green"):
            write(canary, colour, 30)
        assert look(trial)["errors"].verdict == NO_DATA
        for colour in ("blue", "green"):
            write(canary, colour, 30)
        assert look(trial)["errors"].verdict == PASS
        write(canary, "green", 20, status=502)
        assert look(trial)["errors"].verdict == FAIL


@pytest.fixture
def processors(monkeypatch):
    """What the processors have done: the test sets it."""
    times = SimpleNamespace(ran=1000, stolen=5000)
    monkeypatch.setattr(host, "processor", lambda: host.Processor(times.ran, times.stolen))
    return times


def bake(box):
    write(box, "blue", 500)
    assert box.run("swap").status == 0
    return closing(Trial(config.load(box.config), plan.read(box.state_dir / "rollout.json")))


def test_a_bake_doesnt_blame_the_release_for_what_other_machines_took(canary, processors, monkeypatch):
    monkeypatch.setattr(watch, "_SETTLING_SECONDS", 0.0)
    real = time.monotonic
    with bake(canary) as trial:
        write(canary, "green", 50)
        assert look(trial)["p50"].verdict == PASS
        write(canary, "green", 200, seconds=0.06)
        processors.ran, processors.stolen = processors.ran + 85, processors.stolen + 15
        found = look(trial)
        assert (found["p50"].verdict, found["errors"].verdict) == (NO_DATA, PASS), found
        assert "15% of the processor's time was taken by other machines" in found["p50"].text, found
        # Ten times as long isn't explained by that.
        write(canary, "green", 500, seconds=0.2)
        assert look(trial)["p50"].verdict == FAIL
        write(canary, "green", 500, status=500)
        assert look(trial)["errors"].verdict == FAIL
        # Nor is anything forgiven once that is longer ago than the window.
        monkeypatch.setattr(time, "monotonic", lambda: real() + 61)
        processors.ran += 20
        write(canary, "green", 500, seconds=0.06)
        assert look(trial)["p50"].verdict == FAIL


def test_the_stolen_time_is_that_of_the_requests(canary, processors, monkeypatch):
    monkeypatch.setattr(watch, "_SETTLING_SECONDS", 0.0)
    canary.configure(bake_seconds=600, judge_min_requests=60, judge_window_seconds=60)
    real = time.monotonic
    with bake(canary) as trial:
        look(trial)
        write(canary, "green", 50, seconds=0.06)
        processors.ran, processors.stolen = processors.ran + 80, processors.stolen + 20
        look(trial)
        # A quiet minute, in which too few ask: the window goes back to those of before.
        monkeypatch.setattr(time, "monotonic", lambda: real() + 61)
        write(canary, "green", 20)
        processors.ran += 20
        found = look(trial)["p50"]
    assert found.verdict == NO_DATA and "17% of the processor's time" in found.text, found


def test_no_stolen_time_excuses_what_is_too_slow_at_any_rate(canary, processors, monkeypatch):
    monkeypatch.setattr(watch, "_SETTLING_SECONDS", 0.0)
    canary.configure(judge_max_p95_ms=50)
    with bake(canary) as trial:
        look(trial)
        write(canary, "green", 500, seconds=0.06)
        processors.stolen += 1000
        found = look(trial)
    assert (found["p50"].verdict, found["p95"].verdict) == (NO_DATA, FAIL), found


@pytest.mark.parametrize("phase", ["bake", "canary"])
def test_a_slow_release_is_slow_on_a_quiet_host_and_beside_a_live_one(canary, processors, monkeypatch, phase):
    monkeypatch.setattr(watch, "_SETTLING_SECONDS", 0.0)
    with bake(canary) if phase == "bake" else begin(canary) as trial:
        look(trial)
        for colour, seconds in (("blue", 0.02), ("green", 0.06)):
            write(canary, colour, 500, seconds)
        share = {"bake": 10, "canary": 90}[phase]
        processors.ran, processors.stolen = processors.ran + 100 - share, processors.stolen + share
        assert look(trial)["p50"].verdict == FAIL


def place(box, fault, data=(1.0, 2.0)):
    """Release 3 on green, whose bundle has examples with this input."""
    box.host.faults["3.0.0"] = {fault}
    directory = box.bundle("3.0.0", 0.5)
    examples = [{"request": {"data": list(data)}, "response": {"output": 0.5 * sum(data)}, "tolerance": 1e-4}] * 2
    (directory / "examples.json").write_text(json.dumps({"examples": examples}))
    box.seal(directory)
    assert box.deploy("green", directory).status == 0


def test_our_own_requests_find_a_colour_that_hangs_soon(canary, monkeypatch):
    monkeypatch.setattr(watch, "_SYNTHETIC_SECONDS", 0.2)
    place(canary, "stuck")
    canary.configure(synthetic_per_second=100, request_timeout_seconds=30)
    with begin(canary) as trial:
        began = time.monotonic()
        canary.host.running["green"].asked = 31
        wait_for(lambda: look(trial)["errors"].verdict == FAIL)
        assert time.monotonic() - began < 20
        # It needn't be found by the number of requests that say something.
        assert look(trial)["errors"].value > 0.9


def own(trial, box, colour, count):
    def enough():
        trial.look()
        return len(trial._log.own(colour, 0).seconds) >= count

    wait_for(enough)


def tried_with_larger_examples(canary, fault_of_the_old):
    """A look after both colours got the larger examples of the new release, which takes a millisecond for a number."""
    canary.host.faults["1.0.0"] = {fault_of_the_old}
    canary.host.start("blue")
    place(canary, "by-length", [1.0] * 20)
    canary.configure(synthetic_per_second=100)
    with begin(canary) as trial:
        for colour in ("blue", "green"):
            own(trial, canary, colour, 40)
        return trial, look(trial)


def test_a_release_with_larger_examples_isnt_slower_for_that(canary):
    _, found = tried_with_larger_examples(canary, "by-length")
    assert found["p50"].verdict == PASS and found["p50"].limit > 20, found["p50"]


def test_where_the_old_release_refuses_the_examples_times_arent_compared(canary):
    trial, found = tried_with_larger_examples(canary, "narrow")
    assert not trial._synthetic.alike
    assert "p50" not in found and found["errors"].verdict == PASS
    assert {check.verdict for check in found.values()} == {PASS}


class Counts:
    """The shadow's socket, and the clock of the watch."""

    def __init__(self, box, monkeypatch):
        self.agree = self.differ = self.error_idle = self.started = 0
        self.now = time.monotonic()
        monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: self.now))
        (box.runtime_dir / "shadow").mkdir()
        self.server = serve(str(box.runtime_dir / "shadow/shadow.sock"), self)

    def answer(self, handler, _body):
        counts = {key: getattr(self, key) for key in ("agree", "differ", "error_idle", "started")}
        handler.send(200, counts | {"shed": 0})


@pytest.fixture
def counts(canary, monkeypatch):
    canary.configure(synthetic_per_second=0, shadow_min_compared=100, judge_window_seconds=60)
    assert canary.run("shadow", "50").status == 0
    counts = Counts(canary, monkeypatch)
    yield counts
    counts.server.shutdown()
    counts.server.server_close()


def pass_time(trial, counts, seconds, **more):
    """So many seconds, with so many more counts in each; the last look's check."""
    for _ in range(seconds):
        counts.now += 1
        for key, value in more.items():
            setattr(counts, key, getattr(counts, key) + value)
        found = look(trial)["shadow"]
    return found


def test_a_shadow_that_gets_no_answers_fails(canary, counts):
    with begin(canary) as trial:
        assert pass_time(trial, counts, 5, agree=30).verdict == PASS
        found = pass_time(trial, counts, 5, error_idle=10)
        assert found.verdict == FAIL and "50 not at all" in found.text


def test_a_late_change_isnt_diluted_by_what_was_before(canary, counts):
    with begin(canary) as trial:
        assert pass_time(trial, counts, 300, agree=100).verdict == PASS
        assert pass_time(trial, counts, 20, differ=100).verdict == FAIL
        # Nor does it condemn for ever.
        assert pass_time(trial, counts, 70, agree=100).verdict == PASS
        assert len(trial._compared) < 70


def test_few_comparisons_are_gathered_for_longer(canary, counts):
    with begin(canary) as trial:
        assert pass_time(trial, counts, 90, agree=1).verdict == NO_DATA
        assert pass_time(trial, counts, 20, agree=1).verdict == PASS
        assert pass_time(trial, counts, 1000).verdict == PASS
        assert len(trial._compared) < 130


def test_the_counts_of_a_daemon_that_started_afresh_begin_at_none(canary, counts):
    with begin(canary) as trial:
        pass_time(trial, counts, 5, agree=1000)
        counts.agree, counts.started = 0, 1
        assert pass_time(trial, counts, 2, differ=100).verdict == FAIL
