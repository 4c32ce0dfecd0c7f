"""deploy: what is checked, what is written, what is put back."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import signal
import stat
import time

import pytest
from rollout_stand_ins import wait_for


def test_a_first_deploy_places_a_release(box):
    answer = box.deploy("blue", box.bundle(), "appliance/model:1", "--reason", "first")
    assert (answer.status, answer.json["ok"], answer.json["changed"], answer.json["release"]) == (0, True, True, 1)
    assert (box.config_dir / "blue.env").read_text() == (
        f"MODEL_IMAGE=sha256:{'1' * 64}\nMODEL_BUNDLE={box.state_dir}/bundles/simplemodel/1.0.0\nMODEL_RELEASE=1\n"
    )
    record = json.loads((box.state_dir / "releases/1/release.json").read_text())
    assert (record["number"], record["colour"], record["name"], record["version"]) == (
        1,
        "blue",
        "simplemodel",
        "1.0.0",
    )
    assert (record["who"], record["reason"], record["image"]) == ("alice", "first", "appliance/model:1")
    assert record["image_id"] == "sha256:" + "1" * 64
    assert record["settings_digest"] is None
    assert record["bundle_digest"] == box.host.running["blue"].digest
    assert box.host.enabled == {"blue"}
    entry = box.audit()[-1]
    assert (entry["command"], entry["outcome"], entry["release"]) == ("deploy blue", "done", 1)


def test_the_same_again_changes_nothing(box):
    directory = box.bundle()
    box.deploy("blue", directory)
    before = len([c for c in box.host.calls if "restart" in c])
    answer = box.deploy("blue", directory)
    assert (answer.status, answer.json["changed"], answer.json["release"]) == (0, False, 1)
    assert len([c for c in box.host.calls if "restart" in c]) == before
    assert not (box.state_dir / "releases/2").exists()


def test_the_same_on_a_colour_that_is_down_is_placed_again(box):
    directory = box.bundle()
    box.deploy("blue", directory)
    box.host.stop("blue")
    answer = box.deploy("blue", directory)
    assert (answer.status, answer.json["changed"], answer.json["release"]) == (0, True, 2)


def test_another_image_under_the_same_tag_is_a_change(box):
    directory = box.bundle()
    box.deploy("blue", directory)
    box.host.images["appliance/model:1"] = "sha256:" + "9" * 64
    assert box.deploy("blue", directory).json["changed"] is True


def test_changed_settings_are_a_change(box):
    settings = box.config_dir / "model.env"
    settings.write_text("MODEL_WORKERS=2\n")
    one = box.bundle()
    box.deploy("blue", one)
    record = json.loads((box.state_dir / "releases/1/release.json").read_text())
    assert record["settings_digest"] == "sha256:" + hashlib.sha256(settings.read_bytes()).hexdigest()
    assert box.deploy("blue", one).json["changed"] is False
    box.run("init", "blue")
    box.deploy("green", one)
    settings.write_text("MODEL_WORKERS=4\n")
    answer = box.deploy("blue", one)
    assert (answer.status, answer.json["changed"], answer.json["pending"], answer.json["release"]) == (
        0,
        False,
        True,
        1,
    )
    assert f"with the changed settings in {settings} isn't placed: swap to green first, then run this" in answer.message
    assert box.deploy("green", one, "appliance/model:1", "--dry-run").json["would_change"] is True
    restarts = len([c for c in box.host.calls if "restart" in c])
    answer = box.deploy("green", one)
    assert (answer.status, answer.json["changed"], answer.json["release"]) == (0, True, 3)
    assert len([c for c in box.host.calls if "restart" in c]) == restarts + 1
    assert box.deploy("green", one).json["changed"] is False
    settings.unlink()
    assert box.deploy("green", one).json["changed"] is True


def test_settings_reach_a_colour_with_its_release_only(box):
    settings = box.config_dir / "model.env"
    settings.write_text("MODEL_MEMORY=1g\n")
    box.live_on_blue()
    blue, green = ((box.config_dir / f"{colour}.env").read_text() for colour in ("blue", "green"))
    assert blue.endswith("\nMODEL_MEMORY=1g\n") and green.endswith("\nMODEL_MEMORY=1g\n")
    settings.write_text("MODEL_MEMORY=64m\n")
    box.host.faults["3.0.0"] = {"crash"}
    three = box.bundle("3.0.0")
    assert "release 2 was put back and is ready" in box.deploy("green", three).message
    assert (box.config_dir / "green.env").read_text() == green
    box.host.faults.clear()
    assert box.deploy("green", three).status == 0
    assert box.host.running["green"].env["MODEL_MEMORY"] == "64m"
    assert (box.config_dir / "blue.env").read_text() == blue


def test_a_record_from_before_the_settings_were_recorded_is_readable(box):
    box.live_on_blue()
    for number in (1, 2):
        path = box.state_dir / f"releases/{number}/release.json"
        record = json.loads(path.read_text())
        del record["settings_digest"]
        path.chmod(0o644)
        path.write_text(json.dumps(record))
    assert box.run("swap").status == 0
    assert box.run("rollback").status == 0
    # What it runs with isn't known, so it counts as changed wherever there are settings now.
    (box.config_dir / "model.env").write_text("MODEL_WORKERS=2\n")
    assert box.deploy("green", box.state_dir / "bundles/simplemodel/2.0.0").json["release"] == 3


def test_on_the_live_colour_a_difference_is_pending(box):
    box.live_on_blue()
    before, env = box.snapshot(), (box.config_dir / "blue.env").read_bytes()
    calls = len([c for c in box.host.calls if "restart" in c])
    answer = box.deploy("blue", box.bundle("3.0.0"))
    assert (answer.status, answer.json["ok"], answer.json["changed"], answer.json["pending"]) == (0, True, False, True)
    assert "blue is live and keeps simplemodel 1.0.0, release 1" in answer.message
    assert "swap to green first" in answer.message
    assert (box.snapshot(), (box.config_dir / "blue.env").read_bytes()) == (before, env)
    assert len([c for c in box.host.calls if "restart" in c]) == calls
    same = box.deploy("blue", box.state_dir / "bundles/simplemodel/1.0.0")
    assert (same.status, same.json["changed"], same.json["pending"]) == (0, False, False)
    assert same.message == "simplemodel 1.0.0, release 1 is live already, on blue: nothing to do"


def test_dry_run_changes_nothing(box):
    before = sorted(str(p) for p in box.root.rglob("*"))
    directory = box.bundle()
    answer = box.deploy("blue", directory, "appliance/model:1", "--dry-run")
    assert (answer.status, answer.json["changed"], answer.json["would_change"]) == (0, False, True)
    assert "as release 1" in answer.message
    after = sorted(str(p) for p in box.root.rglob("*") if "bundles" not in str(p))
    assert after == before
    assert box.audit() == []


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("reject", "weights.pth is [1mbad"),
        ("crash", "keeps ending: 4 restarts"),
        ("exit", "unit is inactive"),
        ("refuse-start", "Job for unit failed"),
        ("wrong", "response.output is 2.5 instead of 1.5"),
        ("predict-500", "answered 500"),
        ("hang", "isn't ready after 1.5 s: health says: starting (the model is [31mwarming up)"),
        ("stale", "runs release 1 instead of release 2"),
    ],
)
def test_a_failed_deploy_puts_the_earlier_release_back(box, fault, words):
    box.deploy("blue", box.bundle("1.0.0"))
    env = (box.config_dir / "blue.env").read_bytes()
    box.host.faults["2.0.0"] = {fault}
    directory = box.bundle("2.0.0")
    started = time.monotonic()
    answer = box.deploy("blue", directory)
    assert (answer.status, answer.json["ok"], answer.json["changed"]) == (1, False, False)
    assert words in answer.message
    assert "release 1 was put back and is ready" in answer.message
    assert (box.config_dir / "blue.env").read_bytes() == env
    assert box.host.running["blue"].env["MODEL_RELEASE"] == "1"
    assert box.audit()[-1]["outcome"] == "failed"
    if fault == "reject":
        assert time.monotonic() - started < 1.4, "a unit that ended is noticed at once"


@pytest.mark.parametrize("killed", ["now", "before"])
def test_a_model_that_needs_more_memory_than_it_may_have_is_told_so(box, killed):
    box.deploy("blue", box.bundle("1.0.0"))
    box.host.faults["2.0.0"] = {"crash"}
    invocation = box.host.units["blue"]["InvocationID"] if killed == "before" else "another"
    box.host.killed = json.dumps({"INVOCATION_ID": invocation, "EXIT_STATUS": "137"}) + "\n"
    answer = box.deploy("blue", box.bundle("2.0.0"))
    assert answer.status == 1 and "release 1 was put back" in answer.message
    told = "raise model_memory in the inventory and deploy again" in answer.message
    assert told is (killed == "now"), answer.message


def test_a_failed_first_deploy_leaves_an_empty_colour(box):
    box.host.faults["1.0.0"] = {"crash"}
    answer = box.deploy("blue", box.bundle())
    assert answer.status == 1
    assert "last journal line: killed by the kernel" in answer.message
    assert "blue is empty again" in answer.message
    assert not (box.config_dir / "blue.env").exists()
    assert box.host.units["blue"]["ActiveState"] == "inactive"
    assert box.run("status").json["colours"]["blue"]["status"] == "empty"
    assert box.host.enabled == set()


def test_an_old_startup_error_doesnt_explain_a_new_failure(box):
    (box.runtime_dir / "blue/startup_error.json").write_text('{"reason": "old story"}')
    box.host.faults["1.0.0"] = {"exit"}
    assert "old story" not in box.deploy("blue", box.bundle()).message


def test_a_link_in_place_of_the_startup_error_isnt_followed(box):
    box.deploy("blue", box.bundle())
    secret = box.root / "secret"
    secret.write_text('{"reason": "a secret of root"}')
    (box.runtime_dir / "blue/startup_error.json").symlink_to(secret)
    box.host.running["blue"].stop()
    assert "secret of" not in json.dumps(box.run("status").json)


def test_a_dripping_health_answer_doesnt_hold_the_engine(box):
    box.configure(request_timeout_seconds=0.3)
    box.deploy("blue", box.bundle())
    box.host.running["blue"].faults.add("drip")
    started = time.monotonic()
    assert "no whole answer within 0.3 s" in box.run("status").json["colours"]["blue"]["reason"]
    assert time.monotonic() - started < 3


def test_bundle_faults(box):
    good = box.bundle()

    def refused(words, directory=good):
        answer = box.deploy("blue", directory)
        assert answer.status == 1, answer.message
        assert words in answer.message
        assert box.audit()[-1]["outcome"] == "refused"
        assert not (box.config_dir / "blue.env").exists()

    refused("isn't a directory", box.root)
    refused("doesn't exist", good.parent / "9.9.9")
    refused("doesn't exist", good.parent.with_name("My_Model") / "1.0.0")
    refused("isn't a valid name and version", box.bundle(name="1st"))
    (good / "extra.txt").write_text("x")
    refused("extra.txt isn't listed")
    (good / "extra.txt").unlink()
    (good / "link").symlink_to("model.py")
    refused("link is a link or a special file")
    (good / "link").unlink()
    (good / "weights.pth").write_text("0.6")
    refused("weights.pth doesn't match its checksum")
    (good / "weights.pth").unlink()
    refused("weights.pth is listed in SHA256SUMS and missing")
    (good / "weights.pth").write_text("0.5")
    sums = (good / "SHA256SUMS").read_text()
    (good / "SHA256SUMS").write_text(sums + "0" * 64 + "  ../other\n")
    refused("outside the bundle")
    (good / "SHA256SUMS").write_text(sums + "rubbish\n")
    refused("line 5 isn't")
    (good / "SHA256SUMS").unlink()
    refused("SHA256SUMS")
    (good / "examples.json").write_text('{"examples": []}')
    box.seal(good)
    refused("holds no example")
    (good / "examples.json").unlink()
    box.seal(good)
    refused("no examples.json")
    (good.parent / "8").symlink_to(good)
    refused("symbolic link", good.parent / "8")


def test_image_faults(box, monkeypatch):
    directory = box.bundle()
    answer = box.deploy("blue", directory, "appliance/model:none")
    assert answer.status == 1 and "isn't on this host" in answer.message
    assert box.deploy("blue", directory, "--force").status == 2
    assert box.deploy("blue", directory, "a b").status == 2
    (box.host.programs / "systemctl").unlink()
    monkeypatch.setenv("PATH", str(box.host.programs))
    answer = box.deploy("blue", directory)
    assert answer.status == 1 and "systemctl isn't on PATH" in answer.message


def test_a_daemon_that_cant_say_isnt_an_image_that_is_gone(box, monkeypatch):
    directory = box.bundle()
    socket = box.host.docker_socket

    def said():
        answer = box.deploy("blue", directory)
        found = re.fullmatch(
            "docker can't say whether the image appliance/model:1 exists: (.*); is the docker service running[?]",
            answer.message,
        )
        assert answer.status == 1 and box.audit()[-1]["outcome"] == "failed"
        return found[1]

    for fault, words in (
        ((500, {"message": "disk\nfailed"}), "disk failed"),
        ((404, {"message": "page not found"}), "page not found"),
        ((404, b"<html>"), f"no usable answer on {socket}: Expecting value"),
        ((200, {"id": 1}), f"no usable answer on {socket}: 'Id'"),
        ((500, []), f"no usable answer on {socket}: list indices"),
    ):
        box.host.docker_fault = fault
        assert said().startswith(words)
    box.host.docker.shutdown()
    box.host.docker.server_close()
    assert said() == f"no usable answer on {socket}: Connection refused"
    os.unlink(socket)
    assert said() == f"no usable answer on {socket}: there is no socket"
    # The units' Docker is this host's, whatever else somebody looks at.
    monkeypatch.setattr("rollout.host._DOCKER", f"unix://{socket}")
    monkeypatch.setenv("DOCKER_HOST", "tcp://192.0.2.1:2375")
    assert said() == f"no usable answer on {socket}: there is no socket"


def test_a_full_disk_leaves_nothing_half_written(box, monkeypatch):
    box.deploy("blue", box.bundle("1.0.0"))
    env = (box.config_dir / "blue.env").read_bytes()
    directory = box.bundle("2.0.0")
    real = os.write

    def full(descriptor, data):
        if b"MODEL_IMAGE" in bytes(data) or b'"bundle_digest"' in bytes(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", full)
    answer = box.deploy("blue", directory)
    assert answer.status == 1 and "disk is full" in answer.message and "release.json" in answer.message
    assert [p.name for p in (box.state_dir / "releases").iterdir()] == ["1"]
    monkeypatch.setattr(os, "write", lambda d, data: full(d, data) if b"MODEL_IMAGE" in bytes(data) else real(d, data))
    answer = box.deploy("blue", directory)
    assert answer.status == 1 and "disk is full" in answer.message
    assert (box.config_dir / "blue.env").read_bytes() == env
    assert sorted(p.name for p in box.config_dir.iterdir()) == ["appliance.json", "blue.env"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_waiting_puts_the_earlier_release_back(box, number):
    box.configure(ready_timeout_seconds=30)
    box.deploy("blue", box.bundle("1.0.0"))
    box.host.faults["2.0.0"] = {"hang"}
    directory = box.bundle("2.0.0")
    process = box.popen("deploy", "blue", "--bundle", directory, "--image", "appliance/model:1")
    wait_for(lambda: (new := box.host.running.get("blue")) and new.version == "2.0.0" and new.looked_at > 1)
    process.send_signal(number)
    answer = box.finish(process)
    assert answer.status == 1
    assert f"interrupted by {number.name}" in answer.message and "release 1 was put back" in answer.message
    assert box.host.running["blue"].version == "1.0.0"
    assert box.audit()[-1]["outcome"] == "failed"
    assert box.deploy("blue", box.state_dir / "bundles/simplemodel/1.0.0").json["changed"] is False


def test_a_signal_while_the_colour_drains_changes_nothing(box):
    box.configure(drain_seconds=30)
    box.live_on_blue()
    directory, green, before = box.bundle("3.0.0"), box.host.running["green"], box.snapshot()
    green.in_progress = [3, 3, 2]
    process = box.popen("deploy", "green", "--bundle", directory, "--image", "appliance/model:1")
    wait_for(lambda: green.in_progress == [2])
    process.send_signal(signal.SIGINT)
    answer = box.finish(process)
    assert answer.status == 1 and "interrupted by SIGINT; nothing was changed" in answer.message, answer.message
    assert box.host.running["green"] is green and box.snapshot() == before
    assert sorted(path.name for path in (box.state_dir / "releases").iterdir()) == ["1", "2"]


def test_a_deploy_that_is_killed_leaves_production_alone(box):
    box.configure(ready_timeout_seconds=30)
    box.live_on_blue()
    before = box.snapshot()
    box.host.faults["3.0.0"] = {"hang"}
    directory = box.bundle("3.0.0")
    process = box.popen("deploy", "green", "--bundle", directory, "--image", "appliance/model:1")
    wait_for(lambda: (new := box.host.running.get("green")) and new.version == "3.0.0" and new.looked_at > 1)
    process.kill()
    process.communicate()
    assert box.snapshot() == before and box.host.running["blue"].version == "1.0.0"
    assert box.run("verify").status == 0 and box.run("status").json["colours"]["green"]["status"] == "starting"
    del box.host.faults["3.0.0"]
    answer = box.deploy("green", directory)
    assert answer.status == 0 and answer.json["changed"], answer.message
    assert (box.host.running["green"].version, box.host.running["green"].status) == ("3.0.0", "ready")
    assert box.run("swap").status == 0


def _releases(box):
    return {int(path.name) for path in (box.state_dir / "releases").iterdir()}


def test_a_deploy_prunes_what_nothing_needs(box):
    box.configure(keep_releases=2)
    box.live_on_blue()
    assert box.run("swap").status == 0
    for number in range(3, 7):
        assert box.deploy("blue", box.bundle(f"{number}.0.0")).status == 0
        # The live one, the one that a rollback would return to, and the last two, of which blue holds one.
        assert _releases(box) == {1, 2, number - 1, number}
    assert box.host.running["green"].version == "2.0.0" and box.run("verify").status == 0


def test_a_prune_that_fails_doesnt_fail_the_deploy(box, monkeypatch):
    box.configure(keep_releases=1)
    box.live_on_blue()
    real = os.rename

    def fails(source, target):
        if ".old-" in str(target) and "releases" in str(target):
            raise OSError(errno.EIO, "Input/output error", str(source))
        real(source, target)

    monkeypatch.setattr(os, "rename", fails)
    answer = box.deploy("green", box.bundle("3.0.0"))
    assert answer.status == 0 and answer.json["changed"], answer.message
    assert "nothing to remove" in answer.err and "releases/2: Input/output error" in answer.err
    # Nor does docker, which knows of no image here.
    assert "'docker image ls" in answer.err
    assert _releases(box) == {1, 2, 3} and box.host.running["green"].version == "3.0.0"


def test_modes_dont_depend_on_the_umask(box):
    earlier = os.umask(0o077)
    try:
        box.live_on_blue()
        assert box.run("swap").status == 0
    finally:
        os.umask(earlier)
    for path in [box.routing, *box.routing.rglob("*"), *box.config_dir.glob("*.env"), box.state_dir / "audit.jsonl"]:
        mode = stat.S_IMODE(path.stat().st_mode)
        assert mode == (0o755 if path.is_dir() else 0o644), path
    assert stat.S_IMODE((box.state_dir / "releases/1").stat().st_mode) == 0o755
    assert stat.S_IMODE((box.state_dir / "releases/1/release.json").stat().st_mode) == 0o444
