"""The service against Kafka over TCP: every message counts once, whatever happens."""

from __future__ import annotations

import json
import os
import random
import signal
import statistics
import threading
import time

import pytest
from drift import config
from drift.kafka import Record, Unreachable
from drift.service import Service
from drift_box import EDGES, Kafka, reference, wait_until


def drawn(count, seed=1):
    generator = random.Random(seed)
    return [(generator.uniform(-1.5, 1.5), generator.uniform(-1.5, 1.5)) for _ in range(count)]


def as_rows(values):
    return [{"features": {"x1": x1, "x2": x2}} for x1, x2 in values]


def running(box, kafka, **changes):
    """The service with simplemodel 1.0.0 live."""
    box.configure(kafka.address, **changes)
    box.make_live("blue", box.bundle())
    box.start()
    return box


def has_rows(box, count, status="ok"):
    def rows_arrived():
        return box.rows(status) == count

    wait_until(rows_arrived)


def check_statistics(box, values, edges=EDGES):
    for feature, column in zip(("x1", "x2"), zip(*values, strict=True), strict=True):
        assert box.metric("training_feature_count", feature=feature) == len(values)
        assert box.metric("training_feature_mean", feature=feature) == pytest.approx(statistics.fmean(column))
        assert box.metric("training_feature_std", feature=feature) == pytest.approx(statistics.stdev(column))
        bounds = [float("-inf"), *edges, float("inf")]
        for number, (low, high) in enumerate(zip(bounds, bounds[1:], strict=False)):
            count = sum(low <= value < high for value in column)
            share = (count + 0.5) / (len(values) + 0.5 * (len(edges) + 1))
            found = box.metric("training_feature_bin_ratio", feature=feature, bin=f"{number:02}")
            assert found == pytest.approx(share), f"{feature} bin {number}"


def test_rows_become_statistics(box, kafka):
    values = drawn(3000)
    kafka.send("rows", *as_rows(values[:1500]))
    running(box, kafka)
    kafka.send("rows", *({"data": list(row), "label": 1} for row in values[1500:]))
    has_rows(box, 3000)
    check_statistics(box, values)
    assert box.metric("training_connected") == 1
    assert box.metric("training_reference_loaded", model="simplemodel") == 1
    assert box.metric("training_consumer_lag", model="simplemodel") == 0
    assert box.metric("training_last_message_timestamp_seconds") == pytest.approx(time.time(), abs=600)


def test_what_is_no_row_is_counted_and_changes_nothing_else(box, kafka):
    values = drawn(100)
    malformed = [b"", b"{", b"\xff", b"[" * 100_000, b"7", {"x1": 1}, {"features": {"x1": 1}, "data": [1, 2]}]
    changed = [{"data": [1]}, {"features": {"x1": 1, "x3": 2}}, {"data": [1, "2"]}, {"data": [True, 2]}]
    kafka.send("rows", *as_rows(values), *malformed, *changed)
    kafka.send(
        "rows", {"data": [0.5, None]}, b'{"data": [0.5, NaN]}', b'{"data": [0.5, 1e400]}', b'{"data": [0.5, 1e39]}'
    )
    running(box, kafka)
    has_rows(box, 100)
    has_rows(box, len(malformed), "malformed")
    has_rows(box, len(changed), "schema")
    has_rows(box, 4, "missing")
    assert box.metric("training_feature_count", feature="x1") == 104
    assert box.metric("training_feature_count", feature="x2") == 100
    assert box.metric("training_feature_mean", feature="x2") == pytest.approx(statistics.fmean(x2 for _, x2 in values))


def test_a_tombstone_is_malformed(box, kafka):
    from confluent_kafka import Producer

    producer = Producer({"bootstrap.servers": kafka.address})
    producer.produce("rows", None, key=b"1")
    producer.flush(60)
    running(box, kafka)
    has_rows(box, 1, "malformed")


def test_every_row_counts_once_over_kills_in_the_middle(box, kafka):
    values = drawn(60_000)
    sent = threading.Event()

    def produce():
        for start in range(0, len(values), 2000):
            kafka.send("rows", *as_rows(values[start : start + 2000]))
        sent.set()

    producing = threading.Thread(target=produce)
    running(box, kafka, save_seconds=0.02)
    producing.start()
    seen, generator = 0, random.Random(3)
    for _ in range(6):

        def goes_on(seen=seen):
            return (box.rows() or 0) > seen or sent.is_set()

        wait_until(goes_on)
        time.sleep(generator.uniform(0, 0.5))
        box.kill()
        box.start()

        def answers():
            return box.rows() is not None

        wait_until(answers)
        # What was seen was on the disk.
        assert box.rows() >= seen
        seen = box.rows()
    producing.join()
    has_rows(box, len(values))
    check_statistics(box, values)


def test_the_end_of_the_service_loses_nothing(box, kafka):
    # So much later that only the end can write.
    running(box, kafka, save_seconds=3600)
    has_rows(box, 0)
    values = drawn(500)
    kafka.send("rows", *as_rows(values))

    def rows_wait_to_be_written():
        return box.metric("training_consumer_lag", model="simplemodel") == 500

    wait_until(rows_wait_to_be_written)
    assert box.terminate() == 0
    (state,) = (box.state / "simplemodel").glob("*.json")
    assert json.loads(state.read_bytes())["rows"]["ok"] == 500
    more = drawn(500, seed=2)
    kafka.send("rows", *as_rows(more))
    box.configure(kafka.address)
    box.start()
    has_rows(box, 1000)
    check_statistics(box, values + more)


def test_another_version_gets_statistics_of_its_own_bins_and_the_way_back_is_short(box, kafka):
    values = drawn(2000)
    kafka.send("rows", *as_rows(values))
    running(box, kafka)
    has_rows(box, 2000)
    narrow = [edge / 3 for edge in EDGES]
    box.make_live("green", box.bundle("1.1.0", reference(x1=narrow, x2=narrow)))

    def has_the_new_bins():
        found = box.metric("training_feature_bin_ratio", feature="x1", bin="00")
        return found and found > 0.3 and box.rows() == 2000

    wait_until(has_the_new_bins)
    check_statistics(box, values, narrow)
    more = drawn(100, seed=2)
    kafka.send("rows", *as_rows(more))
    has_rows(box, 2100)
    box.make_live("blue", box.root / "bundles/simplemodel/1.0.0")

    def has_the_old_bins():
        found = box.metric("training_feature_bin_ratio", feature="x1", bin="00")
        return found and found < 0.3 and box.rows() == 2100

    wait_until(has_the_old_bins)
    check_statistics(box, values + more)


class Library:
    """In place of `drift.kafka.Kafka`: one partition with `messages`, and a script with a step for each poll."""

    def __init__(self, script):
        self.script, self.messages, self.offsets = iter(script), [], {}
        self.is_down = self.is_lost = self.is_unreachable = False

    def partitions(self, topic):
        if self.is_unreachable:
            raise Unreachable("no answer")
        return "cluster", {0}

    def bounds(self, topic, partition):
        return 0, len(self.messages)

    def end(self, topic, partition):
        return len(self.messages)

    def assign(self, offsets):
        self.offsets = dict(offsets)

    def poll(self, seconds):
        next(self.script)(self)
        for (topic, partition), offset in self.offsets.items():
            for number in range(offset, len(self.messages)):
                yield Record(topic, partition, number + 1, self.messages[number], None)
            self.offsets[topic, partition] = len(self.messages)

    def close(self):
        pass


def run_with(box, monkeypatch, *script):
    """The service with this library, until the script has ended. Returns what it published in the end."""
    stop = threading.Event()
    monkeypatch.setattr("drift.service.Kafka", lambda _: Library([*script, lambda _: stop.set()]))
    for name in ("_FOLLOW_SECONDS", "_CHECK_SECONDS"):
        monkeypatch.setattr(f"drift.service.{name}", 0.0)
    box.configure("unused", save_seconds=0)
    box.make_live("blue", box.bundle())
    service = Service(config.read(box.config))
    service.run(stop)
    return service.published[0].state


def test_after_a_swap_nothing_is_read_before_kafka_says_from_where(box, monkeypatch):
    def some_rows(library):
        library.messages += [b'{"data": [0.1, 0.2]}'] * 3

    def swap(library):
        box.make_live("green", box.bundle("1.1.0", reference(x1=EDGES, x2=[0.0])))
        library.is_unreachable = True

    def recover(library):
        library.is_unreachable = False

    def nothing(_):
        pass

    assert run_with(box, monkeypatch, some_rows, swap, some_rows, recover, nothing, nothing).rows["ok"] == 6


def test_what_the_library_hands_out_twice_counts_once(box, monkeypatch):
    def some_rows(library):
        library.messages += [b'{"data": [0.1, 0.2]}'] * 3

    def again(library):
        library.offsets["rows", 0] = 1

    assert run_with(box, monkeypatch, some_rows, again).rows["ok"] == 3


def test_rows_of_a_new_feature_count_for_the_version_that_knows_it(box, kafka):
    kafka.send("rows", *as_rows(drawn(10)), *({"features": {"x1": 0.1, "x2": 0.2, "x3": 0.3}} for _ in range(20)))
    running(box, kafka)
    has_rows(box, 10)
    has_rows(box, 20, "schema")
    box.make_live("green", box.bundle("2.0.0", reference(x1=EDGES, x2=EDGES, x3=[])))
    has_rows(box, 20)
    has_rows(box, 10, "schema")
    assert box.metric("training_feature_mean", feature="x3") == pytest.approx(0.3)
    assert box.metric("training_feature_bin_ratio", feature="x3") is None


def test_a_bundle_without_a_reference_waits(box, kafka):
    kafka.send("rows", *as_rows(drawn(10)))
    bundle = box.bundle()
    (bundle / "manifest.yaml").write_text("name: simplemodel\nversion: 1.0.0\n")
    box.configure(kafka.address)
    box.make_live("blue", bundle)
    box.start()

    def is_connected():
        return box.metric("training_connected") == 1

    wait_until(is_connected)
    assert box.metric("training_reference_loaded", model="simplemodel") == 0
    assert box.rows() is None
    box.make_live("green", box.bundle("1.1.0"))
    has_rows(box, 10)


def test_kafka_that_hangs_is_shown_and_loses_nothing(box, kafka):
    kafka.send("rows", *as_rows(drawn(100)))
    running(box, kafka)
    has_rows(box, 100)
    os.kill(kafka.process.pid, signal.SIGSTOP)

    def is_disconnected():
        return box.metric("training_connected") == 0

    try:
        wait_until(is_disconnected)
        assert box.rows() == 100
    finally:
        os.kill(kafka.process.pid, signal.SIGCONT)
    kafka.send("rows", *as_rows(drawn(50, seed=2)))
    has_rows(box, 150)

    def is_connected():
        return box.metric("training_connected") == 1

    wait_until(is_connected)
    check_statistics(box, drawn(100) + drawn(50, seed=2))


def test_without_kafka_the_reference_stays_over_a_restart(box, kafka):
    values = drawn(100)
    kafka.send("rows", *as_rows(values))
    running(box, kafka)
    has_rows(box, 100)
    kafka.stop()

    def is_disconnected():
        return box.metric("training_connected") == 0

    wait_until(is_disconnected)
    assert box.terminate() == 0
    box.start()
    has_rows(box, 100)
    check_statistics(box, values)
    assert box.metric("training_connected") == 0


def test_another_cluster_is_begun_anew_and_the_old_statistics_are_set_aside(box, kafka):
    kafka.send("rows", *as_rows(drawn(100)))
    running(box, kafka)
    has_rows(box, 100)
    box.terminate()
    other = Kafka()
    try:
        other.send("rows", *as_rows(drawn(40, seed=2)))
        box.configure(other.address)
        box.start()
        has_rows(box, 40)
    finally:
        other.stop()
    assert "is of the Kafka cluster" in box.log
    assert len(list((box.state / "simplemodel").glob("*.aside"))) == 1


def test_a_topic_that_comes_later_is_waited_for(box, kafka):
    running(box, kafka)

    def is_connected():
        return box.metric("training_connected") == 1

    wait_until(is_connected)
    has_rows(box, 0)
    assert box.metric("training_last_message_timestamp_seconds") is None
    assert box.metric("training_consumer_lag", model="simplemodel") == 0
    kafka.send("rows", *as_rows(drawn(10)))
    has_rows(box, 10)


def test_messages_that_expired_unread_are_counted(box, kafka):
    kafka.send("rows", *as_rows(drawn(10)), partition=0)
    running(box, kafka)
    has_rows(box, 10)
    assert box.metric("training_last_expired_timestamp_seconds") is None
    box.terminate()
    # The mock keeps 5 MiB of a partition.
    kafka.send("rows", *({"data": [0, 0], "padding": "x" * 500_000} for _ in range(30)), partition=0)
    begin = time.time()
    box.start()

    def everything_is_accounted_for():
        expired = box.metric("training_rows_expired_total", model="simplemodel") or 0
        return expired > 0 and box.rows() + expired == 40

    wait_until(everything_is_accounted_for)
    noticed = box.metric("training_last_expired_timestamp_seconds", model="simplemodel")
    assert begin < noticed < time.time()
    box.terminate()
    box.start()
    wait_until(everything_is_accounted_for)
    assert box.metric("training_last_expired_timestamp_seconds", model="simplemodel") == noticed


def test_messages_that_expire_while_the_service_runs_are_counted(box, kafka):
    running(box, kafka)
    kafka.send("rows", *as_rows(drawn(1)), partition=0)
    has_rows(box, 1)
    os.kill(box.process.pid, signal.SIGSTOP)
    try:
        kafka.send("rows", *({"data": [0, 0], "padding": "x" * 500_000} for _ in range(60)), partition=0)
    finally:
        os.kill(box.process.pid, signal.SIGCONT)

    def everything_is_accounted_for():
        expired = box.metric("training_rows_expired_total", model="simplemodel") or 0
        return expired > 0 and box.rows() + expired == 61

    wait_until(everything_is_accounted_for)
    assert box.metric("training_last_expired_timestamp_seconds") == pytest.approx(time.time(), abs=600)


def test_a_damaged_state_is_set_aside_and_the_topic_read_again(box, kafka):
    kafka.send("rows", *as_rows(drawn(100)))
    running(box, kafka)
    has_rows(box, 100)
    box.terminate()
    (state,) = (box.state / "simplemodel").glob("*.json")
    content = state.read_bytes()
    state.write_bytes(content[: len(content) // 2])
    box.start()
    has_rows(box, 100)
    assert state.with_name(f"{state.name}.aside").read_bytes() == content[: len(content) // 2]


def test_a_state_that_cannot_be_written_shows_as_lag_and_loses_nothing(box, kafka):
    running(box, kafka)
    kafka.send("rows", *as_rows(drawn(10)))
    has_rows(box, 10)
    (state,) = (box.state / "simplemodel").glob("*.json")
    obstacle = state.with_name(f".{state.name}.new")
    obstacle.mkdir()
    kafka.send("rows", *as_rows(drawn(20, seed=2)))

    def waits():
        return box.metric("training_consumer_lag", model="simplemodel") == 20

    wait_until(waits)
    assert box.rows() == 10
    assert "can't be written: Is a directory" in box.log
    obstacle.rmdir()
    has_rows(box, 30)


def test_a_second_service_is_refused(box, kafka):
    running(box, kafka)

    def answers():
        return box.metrics()

    wait_until(answers)
    first = box.process
    box.start()
    assert box.process.wait(60) == 1
    assert f"another service uses {box.state}" in box.log
    box.process = first
