"""The metrics for node exporter, read as Prometheus reads them."""

from __future__ import annotations

import fcntl
import os
import threading

import pytest
from prometheus_client.parser import text_string_to_metric_families
from rollout import audit, textfile


@pytest.fixture
def out(tmp_path):
    return tmp_path / "appliance.prom"


def write(box, out, rollout=None):
    """What the file holds: the value by name and labels."""
    engine = box.engine()
    textfile.write(out, engine.config, engine.routing, engine.releases, lambda: rollout)
    families = list(text_string_to_metric_families(out.read_text()))
    assert all(family.documentation and family.type in ("gauge", "counter") for family in families)
    assert all(family.type == "counter" or not family.name.endswith("_total") for family in families)
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


def entry(command, before, after, outcome="done", switch_ms=None, **more):
    durations = {"total_s": 1.0, "switch_ms": switch_ms}
    return {"command": command, "outcome": outcome, "live_before": before, "live_after": after} | {
        "durations": durations,
        **more,
    }


def record(box, *entries):
    for one in entries:
        audit.append(box.state_dir / "audit.jsonl", one)


def test_a_host_without_any_release(box, out):
    samples = write(box, out)
    assert {key for key in samples if key[0] != "appliance_rollout_phase"} == {("appliance_rollbacks_total", "by hand")}
    assert set(samples.values()) == {0}
    assert out.stat().st_mode & 0o777 == 0o644 and os.listdir(out.parent) == [out.name]


def test_what_the_colours_hold_and_where_requests_go(box, out):
    box.live_on_blue()
    samples = write(box, out)
    info = {key[1:] for key in samples if key[0] == "appliance_release_info"}
    assert info == {("blue", "live", "1", "simplemodel", "1.0.0"), ("green", "idle", "2", "simplemodel", "2.0.0")}
    assert (samples["appliance_split_percent",], samples["appliance_maintenance",]) == (0, 0)
    engine = box.engine()
    engine.routing.switch(engine.routing.read()._replace(live="green", split=25, shadow=10, maintenance=True))
    samples = write(box, out)
    assert ("appliance_release_info", "green", "live", "2", "simplemodel", "2.0.0") in samples
    assert samples["appliance_split_percent",] == 25
    assert samples["appliance_shadow_percent",] == 10
    assert samples["appliance_maintenance",] == 1


def test_counters_follow_the_audit_log(box, out):
    record(
        box,
        entry("deploy blue", None, None),
        entry("init blue", None, "blue", switch_ms=4.0, switched_at=1767182400.5),
        entry("swap", "blue", "green", switch_ms=3.5, switched_at=1767182500.25),
        entry("rollback", "green", "blue", switch_ms=2.5, switched_at=1767182600.125),
        # Not switches: refused while another command switched, nothing to do, undone.
        entry("swap", "blue", "green", outcome="refused"),
        entry("swap", "green", "green", outcome="nothing"),
        entry("swap", "blue", "blue", outcome="failed", cause="verification"),
        # A canary goes back without a change of the live colour.
        entry("rollback", "blue", "blue", cause="errors"),
        entry("rollback", "blue", "blue", cause="errors"),
        entry("abort", "blue", "blue", cause="by hand"),
        entry("swap", "blue", None, outcome="failed"),
    )
    samples = write(box, out)
    assert {key[1]: value for key, value in samples.items() if key[0] == "appliance_switches_total"} == {
        "init": 1,
        "swap": 1,
        "rollback": 1,
    }
    assert {key[1]: value for key, value in samples.items() if key[0] == "appliance_rollbacks_total"} == {
        "by hand": 2,
        "verification": 1,
        "errors": 2,
    }
    assert samples["appliance_last_switch_timestamp_seconds",] == 1767182600.125
    assert samples["appliance_last_switch_seconds",] == 0.0025


def test_a_switch_whose_measurement_is_missing(box, out):
    record(box, entry("rollback", "blue", "green", cause="errors", time="2026-01-31T12:00:00Z"))
    samples = write(box, out)
    assert samples["appliance_last_switch_timestamp_seconds",] == 1769860800
    assert ("appliance_last_switch_seconds",) not in samples
    record(box, {"command": "swap", "outcome": "failed", "live_after": "blue", "time": "by hand"})
    samples = write(box, out)
    assert samples["appliance_switches_total", "swap"] == 1
    assert not [key for key in samples if key[0].startswith("appliance_last_switch")]


def test_the_last_rollout(box, out):
    checks = [{"name": "errors", "verdict": "pass"}, {"name": 'a"b\\c\nd', "verdict": "no data", "value": None}]
    samples = write(box, out, {"phase": "canary", "checks": checks})
    phases = {key[1]: value for key, value in samples.items() if key[0] == "appliance_rollout_phase"}
    assert phases == {"canary": 1, "bake": 0, "done": 0, "unjudged": 0, "rolled_back": 0, "aborted": 0, "superseded": 0}
    assert samples["appliance_verdict", "errors", "pass"] == 1
    assert samples["appliance_verdict", 'a"b\\c\nd', "no data"] == 1


def test_what_cant_be_told_is_left_out(box, out):
    box.live_on_blue()
    (box.routing / "current/blue").unlink()
    (box.config_dir / "green.env").write_text("")
    samples = write(box, out)
    assert {key[1:3] for key in samples if key[0] == "appliance_release_info"} == {("blue", "idle")}
    assert ("appliance_split_percent",) not in samples
    assert samples["appliance_switches_total", "init"] == 1


def test_a_host_without_node_exporter(box, tmp_path):
    engine = box.engine()
    textfile.write(tmp_path / "none/appliance.prom", engine.config, engine.routing, engine.releases, lambda: None)
    assert not (tmp_path / "none").exists()


def test_writers_take_turns(box, out, monkeypatch):
    monkeypatch.setattr(textfile, "_WAIT_SECONDS", 20)
    engine, seen, flock = box.engine(), [], fcntl.flock
    inside, go_on, come = (threading.Event() for _ in range(3))

    def locked(*arguments):
        try:
            flock(*arguments)
        except BlockingIOError:
            come.set()
            raise

    monkeypatch.setattr(fcntl, "flock", locked)

    def first():
        inside.set()
        assert go_on.wait(20)
        seen.append("first")
        return {"phase": "canary"}

    def second():
        seen.append("second")
        come.set()
        return {"phase": "bake"}

    threads = []
    for rollout in (first, second):
        arguments = (out, engine.config, engine.routing, engine.releases, rollout)
        threads.append(threading.Thread(target=textfile.write, args=arguments, daemon=True))
        threads[-1].start()
        assert inside.wait(20)
    assert come.wait(20) and seen == [], "the second waits while the first is at it"
    go_on.set()
    for thread in threads:
        thread.join(20)
    assert seen == ["first", "second"]
    assert 'appliance_rollout_phase{phase="bake"} 1.0' in out.read_text()


def test_nobody_waits_long_for_a_turn(box, out, monkeypatch):
    monkeypatch.setattr(textfile, "_WAIT_SECONDS", 0.05)
    with textfile._turn(out.parent), pytest.raises(OSError, match="another process holds it"):
        write(box, out)


def test_the_history_is_read_again_only_where_it_has_grown(box, out, monkeypatch):
    record(box, entry("swap", "blue", "green"))
    write(box, out)
    with monkeypatch.context() as patch:
        patch.setattr(audit, "read", None)
        assert write(box, out)["appliance_switches_total", "swap"] == 1
    record(box, entry("swap", "green", "blue"))
    assert write(box, out)["appliance_switches_total", "swap"] == 2
