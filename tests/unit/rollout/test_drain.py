"""A drain by the colour's own count of requests in progress."""

from __future__ import annotations

import errno

import pytest
from rollout import drain
from rollout.errors import Interrupted, NeedsRoot
from rollout_stand_ins import serve

METRICS = """# HELP model_requests_in_progress Predictions that wait for the model or are in it.
# TYPE model_requests_in_progress gauge
model_requests_in_progress{{model="one"}} {one}
model_requests_in_progress{{model="two"}} {two}
# TYPE model_queue_depth gauge
model_queue_depth{{model="one"}} 7.0
"""


class Control:
    """A control socket that answers each look with the next of `looks`, and goes on with the last."""

    def __init__(self, path, looks):
        self.looks, self.asked = looks, 0
        self.server = serve(str(path), self)

    def answer(self, handler, _body):
        assert handler.path == "/metrics"
        status, text = self.looks[min(self.asked, len(self.looks) - 1)]
        self.asked += 1
        handler.send(status, text.encode())


def look(one, two=0.0):
    return 200, METRICS.format(one=one, two=two)


@pytest.fixture
def blue(box, monkeypatch):
    monkeypatch.setattr(drain, "_POLL_SECONDS", 0.01)
    return box.engine().colour("blue")


@pytest.fixture
def control(box):
    started = []

    def start(*looks):
        started.append(Control(box.runtime_dir / "blue/control.sock", looks))
        return started[-1]

    yield start
    for one in started:
        one.server.shutdown()
        one.server.server_close()


def run(colour, seconds=10.0, between=lambda: None):
    said = []
    return drain.drain(colour, seconds, said.append, between), said


def test_a_drain_ends_when_nothing_was_in_progress_twice(blue, control):
    asked = control(look(2.0, 1.0), look(0.0, 1.0), look(0.0), look(1.0), look(0.0), look(0.0))
    drained, said = run(blue)
    assert (drained.left, drained.note, asked.asked) == (0, None, 6)
    assert said[:2] == ["blue: requests in progress: 3", "blue: requests in progress: 1"]


def test_a_drain_ends_at_its_deadline_and_says_what_is_left(blue, control):
    control(look(2.0))
    drained, said = run(blue, 0.1)
    assert drained.left == 2 and 0.1 <= drained.seconds < 5
    assert said == ["blue: requests in progress: 2"]


def test_a_colour_without_workers_is_drained(blue, control):
    control((200, 'model_workers{state="ready"} 0.0\n'))
    assert run(blue)[0].left == 0


@pytest.mark.parametrize(
    ("answer", "words"),
    [(None, "there is no socket"), ((500, "oops"), "/metrics answers 500"), (look("NaN"), "convert float NaN")],
)
def test_a_colour_that_cant_be_asked_counts_as_drained(blue, control, answer, words):
    if answer:
        control(answer)
    drained, _ = run(blue)
    assert drained.left == 0 and "blue doesn't answer on" in drained.note and words in drained.note


def test_one_look_without_an_answer_isnt_the_end(blue, control):
    asked = control(look(1.0), (500, ""), look(1.0), look(0.0), look(0.0))
    assert run(blue)[0].note is None and asked.asked == 5


def test_an_interruption_is_looked_for_before_each_look(blue, control):
    asked = control(look(1.0))

    def between():
        if asked.asked == 3:
            raise Interrupted("SIGTERM")

    with pytest.raises(Interrupted):
        run(blue, between=between)


def test_a_drain_needs_root(blue, monkeypatch):
    def connect(_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("rollout.unixhttp.UnixConnection.connect", connect)
    with pytest.raises(NeedsRoot):
        run(blue)
