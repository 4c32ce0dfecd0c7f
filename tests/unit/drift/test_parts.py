"""The parts that need no Kafka."""

from __future__ import annotations

import json
import logging
import os
import random
import statistics
from types import SimpleNamespace

import pytest
from drift import config, kafka, live
from drift.errors import DriftError
from drift.reference import parse
from drift.rows import MALFORMED, MISSING, OK, SCHEMA
from drift.rows import parse as parse_row
from drift.state import State, load, save
from drift.statistics import FeatureStatistics
from drift_box import EDGES, reference
from power_cuts import DIED, in_child, record


def state_of(content=None):
    known = parse(json.dumps(content or reference()).encode())
    return known, State.new(known)


@pytest.mark.parametrize("center", [0.0, 1e9])
def test_moments_are_those_of_all_values_whatever_the_batches(center):
    generator = random.Random(1)
    values = [generator.gauss(center, 1.0) for _ in range(5000)]
    found = FeatureStatistics(bins=[0] * 2)
    rest = list(values)
    while rest:
        size = generator.choice([0, 1, 1, 2, 700])
        found.add(rest[:size], [center])
        rest = rest[size:]
    assert found.count == 5000
    assert found.mean == pytest.approx(statistics.fmean(values), rel=1e-13)
    assert found.std == pytest.approx(statistics.stdev(values), rel=1e-8)
    assert found.bins == [sum(value < center for value in values), sum(value >= center for value in values)]


@pytest.mark.parametrize("value", [0.1, 19.99, 95.6])
def test_a_constant_has_its_value_as_mean_and_no_spread_whatever_the_batches(value):
    """The rules ask only whether the deviation is above 0: all else would be a drift of quadrillions of deviations."""
    generator = random.Random(2)
    for _ in range(20):
        found = FeatureStatistics()
        for _ in range(20):
            found.add([value] * generator.choice([1, 2, 3, 7, 13, 700]), [])
            assert (found.mean, found.m2, found.std) == (value, 0.0, 0.0)


def test_what_rounding_left_in_an_earlier_state_is_no_spread():
    assert FeatureStatistics(count=5000, mean=0.1, m2=5e-31).std == 0.0
    assert FeatureStatistics(count=5000, mean=1e9, m2=5e-3).std > 0.0


def test_an_edge_belongs_to_the_bin_above_it():
    found = FeatureStatistics(bins=[0, 0, 0])
    found.add([0.0, 1.0], [0.0, 1.0])
    assert found.bins == [0, 1, 1]


def test_no_share_is_zero_and_together_they_are_one():
    found = FeatureStatistics(bins=[0, 0])
    found.add([1.0, 1.0], [0.0])
    assert found.ratios() == [0.5 / 3, 2.5 / 3]


@pytest.mark.parametrize(
    ("message", "status"),
    [
        (b'{"features": {"x2": 2, "x1": 1}, "id": 7}', OK),
        (b'{"data": [1, 2]}', OK),
        (b'{"data": [1, null]}', MISSING),
        (b'{"data": [1, -Infinity]}', MISSING),
        (b'{"data": [1, 1' + b"0" * 400 + b"]}", MISSING),
        (b'{"data": [[1, 2]]}', SCHEMA),
        (b'{"data": {}}', MALFORMED),
        (b'{"features": []}', MALFORMED),
        (b'{"data": [1' + b"0" * 5000 + b"]}", MALFORMED),
        (None, MALFORMED),
    ],
)
def test_status_of_a_message(message, status):
    found, values = parse_row(message, ["x1", "x2"])
    assert (found, values is None) == (status, status in (MALFORMED, SCHEMA))
    if values:
        assert values[0] == 1.0


def test_a_state_comes_back_as_it_was(tmp_path):
    known, state = state_of()
    state.add([b'{"data": [0.1, 1e38]}', b'{"data": [0.3, null]}', b"?"], known)
    state.offsets, state.cluster, state.last_message, state.expired = {0: 3, 12: 1}, "abc", 1.7e9, 2
    state.last_expired = 1.6e9
    save(tmp_path / "state.json", state, known)
    assert load(tmp_path / "state.json", known) == state
    assert load(tmp_path / "other.json", known) is None


def test_a_state_that_does_not_say_when_rows_expired_is_still_good(tmp_path):
    """The service's first release kept only how many."""
    known, state = state_of()
    state.expired, state.offsets = 2, {0: 3}
    path = tmp_path / "state.json"
    save(path, state, known)
    content = json.loads(path.read_bytes())
    assert content.pop("last_expired") is None
    path.write_text(json.dumps(content))
    assert load(path, known) == state


def test_a_state_of_another_reference_is_refused(tmp_path):
    known, state = state_of()
    other, _ = state_of(reference(x1=EDGES, x2=[edge / 2 for edge in EDGES]))
    save(tmp_path / "state.json", state, known)
    with pytest.raises(DriftError, match="can't be used"):
        load(tmp_path / "state.json", other)


def test_a_state_is_durable_before_it_has_its_name(tmp_path, monkeypatch):
    known, state = state_of()
    calls = record(monkeypatch)
    path = tmp_path / "state.json"
    save(path, state, known)
    assert calls == [("fsync", str(tmp_path / ".state.json.new")), ("rename", str(path)), ("fsync", str(tmp_path))]


@pytest.mark.parametrize("before", [True, False])
def test_a_process_that_ends_while_saving_leaves_the_old_state_or_the_new_one(tmp_path, before):
    known, old = state_of()
    path = tmp_path / "state.json"
    new = old.copy()
    new.add([b'{"data": [0.1, 0.2]}'] * 3, known)
    new.offsets = {0: 3}
    ends, die_at = [], 1
    while True:
        save(path, old, known)
        status = in_child(lambda: save(path, new, known), die_at, before)
        ends.append(load(path, known))
        if status != DIED:
            break
        die_at += 1
    assert status == 0 and len(ends) > 5
    assert all(end in (old, new) for end in ends)
    assert ends[0] == old and ends[-1] == new


def test_the_live_bundle_is_that_of_the_live_colour(box):
    blue, green = box.bundle("1.0.0"), box.bundle("1.1.0")
    assert live.bundle(box.appliance, box.etc) is None
    box.make_live("blue", blue)
    assert live.bundle(box.appliance, box.etc) == blue
    box.make_live("green", green)
    assert live.bundle(box.appliance, box.etc) == green
    os.unlink(box.etc / "green.env")
    with pytest.raises(DriftError, match=r"green\.env can't be read"):
        live.bundle(box.appliance, box.etc)


def test_a_bundle_may_hold_several_models(box):
    outer = box.bundle("1.0.0", name="pair")
    for name, version in (("delivery", "2.0.0"), ("words", "3.0.0")):
        os.rename(box.bundle(version, name=name), outer / name)
    (outer / "words/manifest.yaml").write_text("name: words\nversion: 3.0.0\n")
    (outer / "manifest.yaml").write_text("name: pair\nversion: 1.0.0\nmodels: [delivery, words]\n")
    found = live.models(outer)
    assert [(model.name, model.version) for model in found.values()] == [("delivery", "2.0.0"), ("words", "3.0.0")]
    assert [model.reference is None for model in found.values()] == [False, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"edges": [1, 0]}, "edges must ascend"),
        ({"edges": [0]}, "1 edges need 2 ratios, not 10"),
        ({"mean": "0"}, "mean holds '0', which isn't a finite number"),
        ({"name": ""}, "name is ''"),
    ],
)
def test_a_reference_that_cannot_be_used_says_why(change, message):
    content = reference()
    content["features"][0].update(change)
    with pytest.raises(DriftError, match=message):
        parse(json.dumps(content).encode())


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"features": []}', b'{"features": [1]}'])
def test_what_is_no_reference_is_refused(content):
    with pytest.raises(DriftError):
        parse(content)


def test_models_may_be_called_what_bundles_are(tmp_path):
    path = tmp_path / "drift.json"
    path.write_text(json.dumps({"kafka": {"bootstrap.servers": "a:1"}, "topics": {"My_Model-2": "t"}}))
    assert config.read(path).topics == {"My_Model-2": "t"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kafka": {"sasl.password": "secret"}}, "bootstrap.servers"),
        ({"topics": {}}, "at least one model"),
        ({"topics": {"a": "t", "b": "t"}}, "topic of its own"),
        ({"topics": {"../a": "t"}}, "isn't a model's name"),
        ({"listen_address": "9146"}, "must be HOST:PORT"),
        ({"save_seconds": "2"}, "from 0 on"),
        ({"topic": "rows"}, "topic isn't a setting"),
    ],
)
def test_a_configuration_that_cannot_be_used_says_why_and_no_password(tmp_path, change, message):
    settings = {"kafka": {"bootstrap.servers": "a:1", "sasl.password": "secret"}, "topics": {"a": "t"}}
    path = tmp_path / "drift.json"
    path.write_text(json.dumps({**settings, **change}))
    with pytest.raises(DriftError, match=message) as raised:
        config.read(path)
    assert str(path) in str(raised.value) and "secret" not in str(raised.value)


def test_librdkafka_repeats_itself_in_vain(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(kafka, "time", SimpleNamespace(monotonic=lambda: now[0]))
    seldom = kafka.Seldom(60)

    def told(text):
        return seldom.filter(logging.LogRecord("librdkafka", logging.WARNING, "", 0, text, (), None))

    assert told("broker-1: no answer after 12 ms") and told("broker down")
    assert not told("broker-1: no answer after 13 ms")
    now[0] = 59.0
    assert not told("broker down")
    now[0] = 61.0
    assert told("broker-1: no answer after 14 ms")
