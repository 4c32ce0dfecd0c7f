"""Several things at the same time."""

from __future__ import annotations

import threading
import time

import pytest
from rollout.errors import Interrupted
from rollout.together import together


@pytest.mark.parametrize("most", [1, 2, 5])
def test_outcomes_are_in_the_order_of_the_tasks(most):
    def task(number):
        def run():
            time.sleep(0.02 * (3 - number))
            if number == 1:
                raise ValueError(number)
            return number

        return run

    zero, one, two = together([task(number) for number in range(3)], most)
    assert (zero, type(one), two) == (0, ValueError, 2)
    assert together([], most) == []


def test_no_more_than_most_run_at_a_time():
    running, seen, lock = set(), [], threading.Lock()

    def task():
        me = object()
        with lock:
            running.add(me)
            seen.append(len(running))
        time.sleep(0.02)
        with lock:
            running.discard(me)

    together([task] * 6, 2)
    assert max(seen) == 2


def test_after_a_signal_nothing_more_begins():
    main, begun = threading.current_thread(), []
    waiting = threading.Event()

    def task():
        begun.append(1)
        if threading.current_thread() is main:
            raise Interrupted("SIGTERM")
        waiting.wait(5)

    with pytest.raises(Interrupted):
        together([task] * 9, 2)
    count = len(begun)
    waiting.set()
    time.sleep(0.1)
    assert len(begun) == count <= 2
