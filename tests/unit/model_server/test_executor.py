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

    name, version = "fake", "1"
    max_delay_seconds = 0.0

    def __init__(self, batch_seconds=0.0, max_batch_rows=8):
        self.batch_seconds = batch_seconds
        self.max_batch_rows = max_batch_rows
        self.bundle = SimpleNamespace(output=SimpleNamespace(labels=()))
        self.batches = []
        self.hold = threading.Event()
        self.hold.set()

    def prepare(self, rows):
        if 1000 in rows:
            raise BadRequest("can't be prepared")
        return rows

    def predict(self, parts, wants_tensor=False):
        self.batches.append((wants_tensor, [list(part) for part in parts]))
        self.hold.wait(SECONDS)
        if any(row < 0 for part in parts for row in part):
            raise ModelFailed("negative")
        return [[row * row for row in part] for part in parts]


class Harness:
    """An executor with its calls' results, driven as the server's loop drives it."""

    def __init__(self, model, limit=1000):
        self.model = model
        self.results = {}
        self.woken = threading.Event()
        self.executor = Executor(Models([model]), limit, FakeMetrics(), lambda _: None)
        self.executor.wake = self.woken.set

    def call(self, key, rows, **details):
        made = Call(self.model, rows, lambda outputs: Reply(repr(outputs).encode()), **details)
        made.finish = lambda _, result: self.results.__setitem__(key, result)
        return made

    def submit(self, key, rows, **details):
        try:
            self.executor.submit(self.call(key, rows, **details))
        except Refusal as refusal:
            self.results[key] = refusal

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
    model.hold.clear()
    harness.submit("first", [1])
    while not model.batches:
        time.sleep(0.001)
    for key in range(4):
        harness.submit(key, [key])
    harness.submit("tensor", [5], wants_tensor=True)
    model.hold.set()
    harness.run_until(6)
    assert model.batches == [(False, [[1]]), (False, [[0], [1], [2], [3]]), (True, [[5]])]


def test_a_full_queue_refuses_and_the_rest_is_served():
    model = FakeModel(batch_seconds=1.0)
    harness = Harness(model, limit=2)
    model.hold.clear()
    harness.submit("running", [1])
    while not model.batches:
        time.sleep(0.001)
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
    model.hold.clear()
    harness.submit("running", [1], size=90)
    while not model.batches:
        time.sleep(0.001)
    harness.submit("waits", [1], size=90)
    harness.submit("refused", [1], size=20)
    assert harness.results["refused"].status == 503
    model.hold.set()
    harness.run_until(3)


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
    model.hold.clear()
    harness.submit("running", [1], size=40)
    while not model.batches:
        time.sleep(0.001)
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
    model.hold.clear()
    harness.submit("running", [1])
    while not model.batches:
        time.sleep(0.001)
    harness.submit("late", [2], seconds=0.001, size=module._MOST_WAITING_BYTES // 2)
    harness.submit("gone", [3], is_alive=lambda: False, size=module._MOST_WAITING_BYTES // 2)
    time.sleep(0.01)
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
    model.hold.clear()
    harness.submit("running", [1])
    while not model.batches:
        time.sleep(0.001)
    harness.submit("late", [2], seconds=0.001)
    harness.submit("gone", [3], is_alive=lambda: False)
    harness.submit("patient", [4], seconds=60.0)
    time.sleep(0.01)
    model.hold.set()
    harness.run_until(4)
    assert (harness.results["late"].status, harness.results["late"].reason) == (504, "deadline")
    assert harness.results["gone"].reason == "abandoned"
    assert model.batches[1:] == [(False, [[4]])]


def test_a_bundle_may_ask_to_wait_for_a_fuller_batch():
    model = FakeModel(batch_seconds=1.0, max_batch_rows=3)
    model.max_delay_seconds = SECONDS
    harness = Harness(model)
    for key in range(3):
        harness.submit(key, [key])
        time.sleep(0.01)
    harness.run_until(3)
    assert model.batches == [(False, [[0], [1], [2]])]


def test_waiting_for_a_fuller_batch_leaves_time_for_the_prediction():
    model = FakeModel(batch_seconds=1.0)
    model.max_delay_seconds = SECONDS
    harness = Harness(model)
    harness.submit("patient", [1])
    harness.submit("hasty", [2], seconds=1.0)
    harness.run_until(2)
    assert all(isinstance(result, Reply) for result in harness.results.values())


def test_a_model_that_becomes_slow_leaves_the_loop(monkeypatch):
    monkeypatch.setattr(module, "INLINE_SECONDS", 0.001)
    model = FakeModel(batch_seconds=0.0)
    harness = Harness(model)
    callers = []
    predict = model.predict
    model.predict = lambda *given: (callers.append(threading.current_thread().name), time.sleep(0.2), predict(*given))[
        2
    ]
    harness.submit("quick so far", [1])
    harness.run_until(1)
    harness.submit("slow", [2])
    harness.run_until(2)
    assert callers == ["MainThread", "model"]


def test_a_wrong_number_of_outputs_is_nobodys_answer():
    model = FakeModel()
    model.predict = lambda parts, _: [[1]]
    harness = Harness(model)
    harness.submit("a", [1])
    harness.submit("b", [2])
    harness.run_until(2)
    # Together there is one answer too few, alone each gets its own.
    assert [harness.results[key].body for key in "ab"] == [b"[1]", b"[1]"]
