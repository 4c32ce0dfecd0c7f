"""Batches never mix answers, whatever is thrown at them."""

import threading
import time
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from model_server import executor as module
from model_server.core import Call, Models, Refusal, Reply
from model_server.errors import ModelFailed
from model_server.executor import Executor
from model_server.payload import BadRequest

SECONDS = 20


class FakeMetrics:
    """Takes everything."""

    def __getattr__(self, name):
        return self

    def __call__(self, *_, **__):
        return self


class FakeModel:
    """Answers each row with its square; negative rows break the batch they are in, rows of 1000 can't be prepared."""

    version = "1"
    max_delay_seconds = 0.0

    def __init__(self, batch_seconds=0.0, max_batch_rows=8, name="fake"):
        self.name = name
        self.batch_seconds = batch_seconds
        self.max_batch_rows = max_batch_rows
        self.bundle = SimpleNamespace(output=SimpleNamespace(labels=()))
        self.batches = []
        self.started = threading.Event()
        self.hold = threading.Event()
        self.hold.set()

    def prepare(self, rows):
        if 1000 in rows:
            raise BadRequest("can't be prepared")
        return rows

    def predict(self, parts, wants_tensor=False):
        self.batches.append((wants_tensor, [list(part) for part in parts]))
        self.started.set()
        self.hold.wait(SECONDS)
        if any(row < 0 for part in parts for row in part):
            raise ModelFailed("negative")
        return [[row * row for row in part] for part in parts]


class Harness:
    """An executor with its calls' results, driven as the server's loop drives it."""

    def __init__(self, *models, limit=1000):
        self.model = models[0]
        self.results = {}
        self.stamps = []
        self.woken = threading.Event()
        self.executor = Executor(Models(models), limit, FakeMetrics(), self.stamps.append)
        self.executor.wake = self.woken.set

    def call(self, key, rows, model=None, **details):
        made = Call(model or self.model, rows, lambda outputs: Reply(repr(outputs).encode()), **details)
        made.finish = lambda _, result: self.results.__setitem__(key, result)
        return made

    def submit(self, key, rows, **details):
        try:
            self.executor.submit(self.call(key, rows, **details))
        except Refusal as refusal:
            self.results[key] = refusal

    def hold(self, key, rows, **details):
        """Have the model stay at this call until its ``hold`` is set."""
        self.model.hold.clear()
        self.submit(key, rows, **details)
        assert self.model.started.wait(SECONDS)

    def submit_and_wait_for_company(self, key, rows):
        """Submit a call for which the thread then waits for others to make a batch with."""
        gathers = threading.Event()
        condition = self.executor._some
        wait = condition.wait
        condition.wait = lambda seconds=None: (seconds and gathers.set(), wait(seconds))
        self.submit(key, rows)
        assert gathers.wait(SECONDS)

    def run_until(self, count):
        deadline = time.monotonic() + SECONDS
        while len(self.results) < count:
            assert time.monotonic() < deadline, self.results
            self.executor.run_inline()
            self.executor.deliver()
            self.woken.wait(0.01)
            self.woken.clear()


def expected(rows):
    if 1000 in rows:
        return BadRequest
    if any(row < 0 for row in rows):
        return ModelFailed
    return repr([row * row for row in rows]).encode()


def check(result, rows):
    wanted = expected(rows)
    if isinstance(wanted, bytes):
        assert isinstance(result, Reply) and result.body == wanted
    elif wanted is BadRequest:
        assert isinstance(result, Refusal) and result.status == 400
    else:
        assert isinstance(result, ModelFailed)


REQUESTS = st.lists(
    st.tuples(st.lists(st.sampled_from([-1, 0, 1, 2, 3, 1000]), min_size=1, max_size=12), st.booleans()), max_size=40
)


@pytest.mark.parametrize("batch_seconds", [0.0, 1.0], ids=["in the loop", "in a thread"])
@settings(max_examples=60, deadline=None)
@given(requests=REQUESTS)
def test_everybody_gets_their_own_answer(batch_seconds, requests):
    harness = Harness(FakeModel(batch_seconds))
    for key, (rows, wants_tensor) in enumerate(requests):
        harness.submit(key, rows, wants_tensor=wants_tensor)
    harness.run_until(len(requests))
    for key, (rows, _) in enumerate(requests):
        check(harness.results[key], rows)
    for _, parts in harness.model.batches:
        assert len(parts) == 1 or sum(len(part) for part in parts) <= harness.model.max_batch_rows


def test_what_waits_is_taken_together_and_unlike_calls_apart():
    model = FakeModel(batch_seconds=1.0)
    harness = Harness(model)
    harness.hold("first", [1])
    for key in range(4):
        harness.submit(key, [key])
    harness.submit("tensor", [5], wants_tensor=True)
    model.hold.set()
    harness.run_until(6)
    assert model.batches == [(False, [[1]]), (False, [[0], [1], [2], [3]]), (True, [[5]])]


def test_a_full_queue_refuses_and_the_rest_is_served():
    model = FakeModel(batch_seconds=1.0)
    harness = Harness(model, limit=2)
    harness.hold("running", [1])
    for key in ("a", "b", "refused"):
        harness.submit(key, [2])
    refusal = harness.results["refused"]
    assert (refusal.status, refusal.reason, refusal.headers) == (503, "queue_full", (("Retry-After", "1"),))
    model.hold.set()
    harness.run_until(4)
    assert all(isinstance(harness.results[key], Reply) for key in ("running", "a", "b"))


def test_bodies_that_wait_are_bounded_too(monkeypatch):
    monkeypatch.setattr(module, "_MOST_WAITING_BYTES", 100)
    model = FakeModel(batch_seconds=1.0)
    harness = Harness(model)
    harness.hold("running", [1], size=90)
    harness.submit("waits", [1], size=90)
    harness.submit("refused", [1], size=20)
    assert harness.results["refused"].status == 503
    model.hold.set()
    harness.run_until(3)


def test_bodies_that_wait_for_the_loop_are_run_before_they_are_too_much(monkeypatch):
    monkeypatch.setattr(module, "_MOST_WAITING_BYTES", 100)
    harness = Harness(FakeModel())
    for key in range(6):
        harness.submit(key, [key], size=40)
        assert len(harness.results) == (key + 1) // 3 * 3
    harness.submit("large", [7], size=1000)
    assert len(harness.results) == 7 and all(isinstance(result, Reply) for result in harness.results.values())
    # Each turn begins anew.
    harness.submit("turn", [8], size=90)
    harness.executor.run_inline()
    harness.submit("next", [9], size=90)
    assert "turn" in harness.results and "next" not in harness.results


def test_a_body_that_waits_alone_may_be_of_any_size(monkeypatch):
    monkeypatch.setattr(module, "_MOST_WAITING_BYTES", 100)
    harness = Harness(FakeModel(batch_seconds=1.0))
    harness.submit("large", [1], size=1000)
    harness.run_until(1)
    assert isinstance(harness.results["large"], Reply)


def test_turns_of_the_loop_leave_the_threads_queue_alone(monkeypatch):
    monkeypatch.setattr(module, "_MOST_WAITING_BYTES", 100)
    model = FakeModel(batch_seconds=1.0)
    harness = Harness(model)
    harness.hold("running", [1], size=40)
    harness.submit("waits", [2], size=40)
    for _ in range(5):
        harness.executor.run_inline()
    # Counted once, its bytes leave room for as many again, now and afterwards.
    harness.submit("waits too", [3], size=40)
    model.hold.set()
    harness.run_until(3)
    harness.submit("later", [4], size=90)
    harness.run_until(4)
    assert all(isinstance(result, Reply) for result in harness.results.values())
    assert [part for _, parts in model.batches for part in parts] == [[1], [2], [3], [4]]


def test_those_who_gave_up_leave_their_places():
    model = FakeModel(batch_seconds=1.0)
    harness = Harness(model, limit=2)
    harness.hold("running", [1])
    harness.submit("late", [2], received=time.perf_counter() - 1, seconds=0.5, size=module._MOST_WAITING_BYTES // 2)
    harness.submit("gone", [3], is_alive=lambda: False, size=module._MOST_WAITING_BYTES // 2)
    for key in ("a", "b"):
        harness.submit(key, [4], size=module._MOST_WAITING_BYTES // 2)
    harness.submit("refused", [5])
    harness.run_until(3)
    assert [harness.results[key].reason for key in ("late", "gone", "refused")] == [
        "deadline",
        "abandoned",
        "queue_full",
    ]
    model.hold.set()
    harness.run_until(6)
    assert all(isinstance(harness.results[key], Reply) for key in ("running", "a", "b"))


@pytest.mark.parametrize("batch_seconds", [0.0, 1.0], ids=["in the loop", "in a thread"])
def test_rows_that_take_long_to_prepare_hold_up_nobody(monkeypatch, batch_seconds):
    monkeypatch.setattr(module, "_PREPARE_SECONDS", 0.02)
    monkeypatch.setattr(module, "INLINE_SECONDS", 1.0 if batch_seconds == 0.0 else 0.0)
    model, rows = FakeModel(batch_seconds), [1, 3, 2, 0, 3, 2]
    prepare = model.prepare
    model.prepare = lambda rows: (time.sleep(0.05 if 3 in rows else 0), prepare(rows))[1]
    harness = Harness(model)
    if batch_seconds:
        model.hold.clear()
    for key, row in enumerate(rows):
        harness.submit(key, [row])
    model.hold.set()
    harness.run_until(len(rows))
    for key, row in enumerate(rows):
        assert harness.results[key].body == repr([row * row]).encode()
    assert max(sum(part == [3] for part in parts) for _, parts in model.batches) == 1
    assert [part for _, parts in model.batches for part in parts] == [[row] for row in rows]


def test_those_who_gave_up_are_not_computed():
    model = FakeModel(batch_seconds=1.0)
    harness = Harness(model)
    harness.hold("running", [1])
    harness.submit("late", [2], received=time.perf_counter() - 1, seconds=0.5)
    harness.submit("gone", [3], is_alive=lambda: False)
    harness.submit("patient", [4], seconds=60.0)
    model.hold.set()
    harness.run_until(4)
    assert (harness.results["late"].status, harness.results["late"].reason) == (504, "deadline")
    assert harness.results["gone"].reason == "abandoned"
    assert model.batches[1:] == [(False, [[4]])]


def test_a_bundle_may_ask_to_wait_for_a_fuller_batch():
    model = FakeModel(batch_seconds=1.0, max_batch_rows=3)
    model.max_delay_seconds = 10 * SECONDS
    harness = Harness(model)
    harness.submit_and_wait_for_company(0, [0])
    for key in (1, 2):
        harness.submit(key, [key])
    harness.run_until(3)
    assert model.batches == [(False, [[0], [1], [2]])]


def test_waiting_for_a_fuller_batch_holds_up_no_other_model():
    patient, other = FakeModel(batch_seconds=1.0), FakeModel(batch_seconds=1.0, name="other")
    patient.max_delay_seconds = 10 * SECONDS
    harness = Harness(patient, other)
    harness.submit_and_wait_for_company("patient", [2])
    harness.submit("other", [3], model=other)
    harness.run_until(2)
    assert all(isinstance(result, Reply) for result in harness.results.values())


def test_models_take_turns():
    flooded, other = FakeModel(batch_seconds=1.0, max_batch_rows=1), FakeModel(batch_seconds=1.0, name="other")
    # In one list the order shows.
    other.batches = flooded.batches
    harness = Harness(flooded, other)
    harness.hold("running", [0])
    for key in range(50):
        harness.submit(key, [key])
    harness.submit("other", [100], model=other)
    assert len(harness.executor._threaded) == 2
    flooded.hold.set()
    harness.run_until(52)
    assert [parts for _, parts in flooded.batches].index([[100]]) <= 2
    assert not harness.executor._threaded


def test_what_failed_together_is_tried_apart_by_whoever_still_waits():
    model, other = FakeModel(batch_seconds=1.0), FakeModel(batch_seconds=1.0, name="other")
    other.batches = model.batches
    harness = Harness(model, other)
    harness.hold("running", [0])
    harness.submit("bad", [-1], size=100)
    # Leaves while the one before it is tried.
    harness.submit("gone", [2], is_alive=lambda: model.batches[-1][1] != [[-1]])
    harness.submit("good", [3])
    harness.submit("other", [100], model=other)
    model.hold.set()
    harness.run_until(5)
    assert harness.results["gone"].reason == "abandoned"
    check(harness.results["bad"], [-1])
    check(harness.results["good"], [3])
    assert [parts for _, parts in model.batches] == [[[0]], [[-1], [2], [3]], [[100]], [[-1]], [[3]]]
    # For those who look for one that hangs, each try begins anew; one of them came too late to be run.
    assert harness.stamps == [True, False] * 6
    assert harness.executor._bytes == 0


def test_quick_models_leave_the_mark_of_one_that_hangs():
    slow, quick = FakeModel(batch_seconds=1.0), FakeModel(name="quick")
    harness = Harness(slow, quick)
    harness.hold("slow", [1])
    harness.submit("quick", [2], model=quick)
    harness.run_until(1)
    assert list(harness.results) == ["quick"] and harness.stamps == [True]
    slow.hold.set()
    harness.run_until(2)
    assert harness.stamps == [True, False]


def test_waiting_for_a_fuller_batch_leaves_time_for_the_prediction():
    model = FakeModel(batch_seconds=1.0)
    model.max_delay_seconds = SECONDS
    harness = Harness(model)
    harness.submit("patient", [1])
    harness.submit("hasty", [2], seconds=1.0)
    harness.run_until(2)
    assert all(isinstance(result, Reply) for result in harness.results.values())


class Clock:
    """A clock that stands still but for what a test adds."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: self.now))


def callers_of(clock, durations):
    """Which thread calls a quick model for each of as many batches, which take that long."""
    model, callers = FakeModel(), []
    predict = model.predict

    def slow_predict(*given):
        callers.append(threading.current_thread().name)
        clock.now += durations[len(callers) - 1]
        return predict(*given)

    model.predict = slow_predict
    harness = Harness(model)
    for key in range(len(durations)):
        harness.submit(key, [key], received=0.0)
        harness.run_until(key + 1)
    return callers


def test_a_model_that_becomes_slow_leaves_the_loop(monkeypatch):
    callers = callers_of(Clock(monkeypatch), [0.001] * 100 + [0.02] * 100)
    assert callers[:101] == ["MainThread"] * 101 and callers[-1] == "model"


@pytest.mark.parametrize("before", [0, 100], ids=["at its first batch", "later"])
def test_a_quick_model_stays_in_the_loop_when_it_stalls_once(monkeypatch, before):
    callers = callers_of(Clock(monkeypatch), [0.001] * before + [10.0] + [0.001] * 10)
    assert set(callers) == {"MainThread"}


def test_a_wrong_number_of_outputs_is_nobodys_answer():
    model = FakeModel()
    model.predict = lambda parts, _: [[1]]
    harness = Harness(model)
    harness.submit("a", [1])
    harness.submit("b", [2])
    harness.run_until(2)
    # Together there is one answer too few, alone each gets its own.
    assert [harness.results[key].body for key in "ab"] == [b"[1]", b"[1]"]
