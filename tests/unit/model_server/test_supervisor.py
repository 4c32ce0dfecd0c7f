"""The parts of supervision that need no processes."""

from model_server.supervisor import Backoff


def test_backoff_is_immediate_then_doubles_to_a_cap_and_resets():
    backoff = Backoff()
    delays = [backoff.next_delay(1) for _ in range(2000)]
    assert delays[:8] == [0, 0.25, 0.5, 1, 2, 4, 8, 10]
    assert set(delays[8:]) == {10}
    assert backoff.next_delay(60) == 0
    assert backoff.next_delay(1) == 0.25
