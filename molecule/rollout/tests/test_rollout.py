"""New releases under traffic: good ones go live, bad ones go back by themselves, whoever goes away meanwhile."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(PROJECT / "tests/load"))

from user_traffic import UserTraffic  # noqa: E402
from worse_releases import RELEASES, write_release  # noqa: E402

SETTINGS = {
    "rollout_canary_step_seconds": 6,
    "rollout_bake_seconds": 10,
    "rollout_judge_window_seconds": 20,
    "rollout_synthetic_per_second": 20.0,
}


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """A bundle for each of RELEASES."""
    folder = tmp_path_factory.mktemp("bundles")
    return {version: write_release(folder, version) for version in RELEASES}


@pytest.fixture(scope="module", autouse=True)
def quick(playbook):
    """Short steps and bakes; in the end what the inventory says."""
    assert playbook("site", "--tags", "rollout", "-e", json.dumps(SETTINGS)).returncode == 0
    yield
    for arguments in ([], ["--tags", "releases"], ["--tags", "releases"]):
        assert playbook("site", *arguments).returncode == 0


@pytest.fixture
def place(playbook, engine, bundles):
    """Place a version on the idle colour, whatever went on before; returns the idle colour."""

    def deploy(version):
        if engine("status")["rollout"]:
            engine("promote")
            for _ in range(300):
                if not engine("status")["rollout"]:
                    break
                time.sleep(0.1)
        told = playbook("deploy", "-e", f"bundle={bundles[version]}")
        assert told.returncode == 0, told.stdout[-3000:]
        return engine("status")["idle"]

    return deploy


@pytest.fixture
def good_is_live(place, engine):
    """Release 20.0.0 live, with the 20.0.1 or an earlier one beside it."""
    status = engine("status")
    if status["colours"][status["live"]]["version"] not in ("20.0.0", "20.0.1"):
        place("20.0.0")
        # Slower than what the inventory has, which its bake would find out.
        assert engine("swap")["rc"] == 0 and engine("promote")["rc"] == 0


def rollout(playbook, *arguments):
    return playbook("swap", "-e", "strategy=canary", *arguments)


def test_a_good_release_goes_live_step_by_step(good_is_live, place, playbook, engine, edge):
    idle = place("20.0.1")
    with UserTraffic(edge.url) as traffic:
        told = rollout(playbook)
    assert told.returncode == 0, told.stdout[-3000:]
    assert engine("status")["live"] == idle and engine("status")["rollout"] is None
    assert traffic.failed() == 0 < traffic.counts()[200, idle], traffic.counts()
    text = " ".join(told.stdout.split())
    assert "canary" in text and f"done; {idle} is live" in text


@pytest.mark.parametrize(("version", "word"), [("20.1.0", "errors"), ("20.2.0", "p50")], ids=["fails", "is slow"])
def test_a_canary_that_does_worse_goes_back_before_a_quarter(
    good_is_live, place, playbook, engine, edge, host, version, word
):
    live = engine("status")["live"]
    place(version)
    with UserTraffic(edge.url) as traffic:
        told = rollout(playbook)
    assert told.returncode != 0
    assert word in told.stdout and f"back on {live}" in " ".join(told.stdout.split())
    status = engine("status")
    assert status["live"] == live and status["split"] == 0
    assert traffic.failed() < 0.05 * len(traffic.answers), traffic.counts()
    entries = engine("history -n 20")["entries"]
    last = [entry for entry in entries if entry["command"] == "rollback"][-1]
    assert (last["cause"], last["live_after"]) == (word, live)
    assert not any(entry["command"] == "canary" and "25 %" in entry["message"] for entry in entries[-6:])


def test_a_release_that_fails_after_the_switch_is_back_within_30_seconds(good_is_live, place, engine, edge):
    live = engine("status")["live"]
    idle = place("20.1.0")
    with UserTraffic(edge.url) as traffic:
        traffic.more(100)
        started = time.monotonic()
        assert engine("swap")["live"] == idle
        while engine("status")["live"] != live:
            assert time.monotonic() < started + 30, "still on the bad release"
            time.sleep(0.2)
        # What was on its way to the bad release has been answered by then.
        traffic.more(50)
        before = traffic.failed()
        traffic.more(100)
        assert traffic.failed() == before
    assert traffic.failed() > 0
    last = [entry for entry in engine("history -n 10")["entries"] if entry["command"] == "rollback"][-1]
    assert last["cause"] == "errors"


def test_a_swap_that_is_followed_fails_with_its_bake(good_is_live, place, playbook, engine, edge):
    live = engine("status")["live"]
    place("20.1.0")
    with UserTraffic(edge.url):
        told = playbook("swap", "-e", "follow=true")
    assert told.returncode != 0
    assert f"back on {live}" in " ".join(told.stdout.split())
    assert engine("status")["live"] == live


def test_without_clients_the_examples_are_sent(good_is_live, place, playbook, engine):
    idle = place("20.0.1" if engine("status")["colours"][engine("status")["live"]]["version"] == "20.0.0" else "20.0.0")
    told = rollout(playbook, "-e", "steps=50,100")
    assert told.returncode == 0, told.stdout[-3000:]
    assert engine("status")["live"] == idle


def test_a_shadow_stops_a_release_that_answers_otherwise(good_is_live, place, playbook, engine, edge):
    live = engine("status")["live"]
    place("20.3.0")
    assert playbook("shadow", "-e", "percent=100").returncode == 0
    with UserTraffic(edge.url) as traffic:
        told = rollout(playbook)
    assert playbook("shadow", "-e", "percent=0").returncode == 0
    assert told.returncode != 0, told.stdout[-3000:]
    entries = engine("history -n 6")["entries"]
    assert [entry["cause"] for entry in entries if entry["command"] == "rollback"][-1] == "shadow"
    assert not any(entry["command"] == "canary" and "25 %" in entry["message"] for entry in entries)
    assert engine("status")["live"] == live
    assert traffic.failed() == 0


def test_users_keep_their_colour_and_may_choose(good_is_live, place, playbook, engine, edge):
    place("20.2.0")
    status = engine("status")
    assert playbook("swap", "-e", "weight=50").returncode == 0
    users = [f"user-{number}" for number in range(60)]
    first, second = (
        [edge.predict(**{"X-User-Id": user}).headers["x-model-colour"] for user in users] for _ in range(2)
    )
    assert first == second and 10 < first.count(status["idle"]) < 50
    for header in ({"X-Model-Track": "idle"}, {"Cookie": "model_track=idle"}):
        assert {edge.predict(**header).headers["x-model-colour"] for _ in range(5)} == {status["idle"]}
    assert {edge.predict(**{"X-Model-Track": "live"}).headers["x-model-colour"] for _ in range(5)} == {status["live"]}
    assert playbook("swap", "-e", "weight=0").returncode == 0
    assert {edge.predict().headers["x-model-colour"] for _ in range(20)} == {status["live"]}


def test_maintenance(playbook, edge):
    assert playbook("maintenance", "-e", "state=on").returncode == 0
    answer = edge.predict()
    assert answer.status == 503 and "maintenance" in answer.json["error"] and answer.headers["retry-after"]
    assert edge.predict("/test/predict").status == 200
    assert edge.request("GET", "/health").status == 200
    assert edge.predict(**{"X-Model-Track": "live"}).status == 200
    assert playbook("maintenance", "-e", "state=off").returncode == 0
    assert edge.predict().status == 200


def test_a_canary_outlives_its_controller(good_is_live, place, engine, lab, eventually):
    live, idle = engine("status")["live"], place("20.0.1" if "20.0.0" in json.dumps(engine("status")) else "20.0.0")
    following = subprocess.Popen(
        ["ssh", "-F", f"{lab['directory']}/ssh_config", "lab", "sudo appliance swap --strategy canary"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    eventually(lambda: engine("status")["rollout"])
    following.kill()
    following.wait()
    eventually(lambda: engine("status")["live"] == idle != live, 120, "the new colour's going live")


@pytest.mark.parametrize("strategy", ["canary --detach", "at-once"], ids=["canary", "bake"])
def test_a_watch_that_is_killed_sends_traffic_back(good_is_live, place, engine, host, eventually, strategy):
    live = engine("status")["live"]
    place("20.2.0")
    assert engine(f"swap --strategy {strategy}")["rc"] == 0
    eventually(lambda: host.run("systemctl is-active appliance-rollout").stdout.strip() == "active")
    host.check_output("systemctl kill --signal=KILL --kill-whom=main appliance-rollout")
    status = eventually(
        lambda: (lambda s: s if s["live"] == live and not s["split"] and not s["rollout"] else None)(engine("status"))
    )
    assert status["live"] == live
    assert engine("history -n 5")["entries"][-1]["cause"] == "unwatched"


def test_a_watch_that_is_killed_comes_back_where_the_old_colour_is_dead(good_is_live, place, engine, host, eventually):
    status = engine("status")
    live = status["live"]
    place("20.0.1" if status["colours"][live]["version"] == "20.0.0" else "20.0.0")
    assert engine("swap --strategy canary --detach")["rc"] == 0
    assert engine("pause")["rc"] == 0
    show = "systemctl show --property=MainPID --value appliance-rollout"
    eventually(lambda: host.run("systemctl is-active appliance-rollout").stdout.strip() == "active")
    watched_by = host.check_output(show)
    host.check_output(f"systemctl stop model@{live}")
    try:
        host.check_output("systemctl kill --signal=KILL --kill-whom=main appliance-rollout")
        eventually(lambda: host.check_output(show) not in ("0", watched_by), 60, "the watch's return")
        status = engine("status")
        assert (status["live"], status["rollout"] is not None) == (live, True) and status["split"]
    finally:
        host.check_output(f"systemctl start model@{live}")
    eventually(lambda: engine("status")["colours"][live]["status"] == "ready", 60)
    assert engine("abort")["rc"] == 0
    assert engine("status")["live"] == live and not engine("status")["split"]


@pytest.mark.parametrize("unit", ["docker", "nginx"])
def test_a_canary_survives_what_hits_both_colours(good_is_live, place, engine, host, eventually, unit):
    live = engine("status")["live"]
    version = engine("status")["colours"][live]["version"]
    idle = place("20.0.1" if version == "20.0.0" else "20.0.0")
    number = engine("swap --strategy canary --detach")["rollout"]
    report = "/run/appliance/rollout.json"
    eventually(lambda: json.loads(host.run(f"cat {report}").stdout)["rollout"] == number, what="a look at the canary")
    host.check_output(f"systemctl kill --signal=KILL {unit}")
    eventually(lambda: engine("status")["rollout"] is None, 240, "the rollout's end")
    # A fault of both alone doesn't condemn the new release.
    assert engine("status")["live"] == idle
    assert engine("verify --wait 60")["rc"] == 0
