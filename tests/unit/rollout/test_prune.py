"""What is pruned, and above all what isn't."""

from __future__ import annotations

import shutil
import subprocess
import time
from types import SimpleNamespace

import pytest
from rollout import audit, files, host, plan, prune
from rollout.errors import Failed, Interrupted
from rollout.releases import Release
from rollout.routing import State


class Docker:
    """Docker's images and containers. `images`: name to id and time; `used`: ids that a container uses."""

    def __init__(self):
        self.images, self.used, self.stuck, self.down = {}, set(), set(), False

    def run(self, command, timeout):
        assert command[0] == "docker" and timeout > 30
        rc, out, err = self.answer(*command[1:])
        return subprocess.CompletedProcess(command, rc, out, err)

    def answer(self, *words):
        if self.down:
            return 1, "", "Cannot connect to the Docker daemon"
        match words:
            case ("image", "ls", "--no-trunc", "--filter", "reference=appliance/model:*", "--format", _):
                rows = [f"{i} {n} {t}\n" for n, (i, t) in self.images.items() if n.startswith("appliance/model:")]
                return 0, "".join(rows), ""
            case ("ps", "--all", "--quiet", "--filter", condition):
                return 0, "0123456789ab\n" if condition.removeprefix("ancestor=") in self.used else "", ""
            case ("image", "rm", name) if name in self.stuck:
                return 1, "", f"conflict: unable to delete {name}"
            case ("image", "rm", name):
                del self.images[name]
                return 0, f"Untagged: {name}\n", ""
        raise AssertionError(words)


class Host:
    """Releases 1, 2, 3 … each with a bundle and an image of its own, two hours old."""

    def __init__(self, box, monkeypatch):
        self.box, self.engine, self.docker = box, box.engine(), Docker()
        self.hours = 2
        monkeypatch.setattr(host, "run", self.docker.run)
        monkeypatch.setattr(prune, "time", SimpleNamespace(time=lambda: time.time() + self.hours * 3600))

    def release(self):
        number = self.engine.releases.next_number()
        bundle = self.box.bundle(f"{number}.0.0")
        identity = f"sha256:{number:064x}"
        self.docker.images[f"appliance/model:{number}"] = (identity, f"2026-01-{number:02} 12:00:00 +0000 UTC")
        about = Release("blue", "simplemodel", bundle.name, str(bundle), "sha256:0", "i", identity, "w", "t")
        return self.engine.releases.create(about)

    def place(self, colour, number):
        releases = self.engine.releases
        releases.place(colour, releases.get(number), None)

    def live(self, previous_release):
        state = State(live="blue", since="t", who="w", previous="green", previous_release=previous_release)
        self.engine.routing.switch(state)

    def prune(self, keep=5, named=frozenset()):
        engine, pruned = self.engine, prune.Pruned()
        prune.prune(engine.config, engine.releases, engine.routing, keep, set(named), pruned, images=True)
        return pruned

    @property
    def numbers(self):
        return {int(path.name) for path in (self.box.state_dir / "releases").iterdir()}

    @property
    def versions(self):
        return {path.name for path in (self.box.state_dir / "bundles/simplemodel").iterdir()}

    @property
    def everything(self):
        return self.numbers, self.versions, set(self.docker.images)


@pytest.fixture
def world(box, monkeypatch):
    return Host(box, monkeypatch)


def test_what_is_in_use_or_named_or_among_the_last_stays(world):
    for _ in range(9):
        world.release()
    world.place("blue", 2)
    world.place("green", 4)
    world.live(previous_release=3)
    world.docker.images |= {
        "appliance/model:next": ("sha256:next", "2026-01-09 11:30:00 -0100 -01"),
        "appliance/base:bookworm": ("sha256:base", "2025-01-01 12:00:00 +0000 UTC"),
        "postgres:16": ("sha256:other", "2025-01-01 12:00:00 +0000 UTC"),
        "mine:keep": world.docker.images["appliance/model:1"],
        # The same image under another name, as a new name for unchanged content is.
        "appliance/model:again": world.docker.images["appliance/model:9"],
    }
    world.docker.used.add(world.docker.images["appliance/model:6"][0])
    pruned = world.prune(keep=2, named={5, 77})
    assert world.numbers == {2, 3, 4, 5, 8, 9}
    assert world.versions == {f"{number}.0.0" for number in (2, 3, 4, 5, 8, 9)}
    names = {f"appliance/model:{name}" for name in (2, 3, 4, 5, 6, 8, 9, "next", "again")}
    assert set(world.docker.images) == names | {"appliance/base:bookworm", "postgres:16", "mine:keep"}
    assert pruned.releases == [1, 6, 7] and pruned.problems == []
    assert pruned.bundles == [f"{world.box.state_dir}/bundles/simplemodel/{number}.0.0" for number in (1, 6, 7)]
    assert pruned.images == ["appliance/model:1", "appliance/model:7"]
    assert pruned.describe() == "removed 3 releases, 3 bundles, 2 images"
    assert world.prune(keep=2, named={5}).describe() == "nothing to remove"


def test_what_failed_pushes_nothing_good_out(world):
    for _ in range(12):
        world.release()
    releases, trail = world.engine.releases, world.engine.config.audit_file
    for number, verdict in {2: "passed", 3: "passed", 4: "skipped", 6: "disabled", 8: "failed", 10: "failed"}.items():
        releases.set_gate(number, verdict, "w")
    # Live without a load test, as the first release is; a command that was refused switched nothing.
    audit.append(trail, {"outcome": "done", "release": 5, "live_before": None, "live_after": "blue"})
    audit.append(trail, {"outcome": "refused", "release": 7, "live_before": "green", "live_after": "blue"})
    assert world.prune(keep=4).releases == [1, 2, 7, 8]
    assert world.numbers == {3, 4, 5, 6, 9, 10, 11, 12}
    assert {"3.0.0", "4.0.0", "5.0.0", "6.0.0"} <= world.versions
    for number in (10, 11, 12):
        releases.set_gate(number, "passed", "w")
    assert world.prune(keep=4).releases == [3, 4, 5]


def test_no_number_is_given_twice(world):
    for _ in range(3):
        world.release()
    assert world.prune(keep=0).releases == [1, 2]
    assert world.release().number == 4


def test_a_bundle_that_two_releases_name_stays_with_one_of_them(world):
    first = world.release()
    world.engine.releases.create(first)
    assert world.prune(keep=1).releases == [1]
    assert world.versions == {"1.0.0"} and set(world.docker.images) == {"appliance/model:1"}


def test_a_state_directory_behind_a_link(world):
    world.release()
    real = world.box.root / "elsewhere"
    shutil.move(world.box.state_dir, real)
    world.box.state_dir.symlink_to(real)
    world.box.configure(state_dir=str(real))
    world.engine = world.box.engine()
    assert world.prune().describe() == "nothing to remove"


def test_what_is_being_delivered_stays(world):
    world.release()
    world.box.bundle("2.0.0")
    incoming = world.box.state_dir / "bundles/simplemodel/.incoming-x"
    incoming.mkdir()
    (world.box.state_dir / "bundles/lost+found/1").mkdir(parents=True)
    for world.hours, versions in (
        (0.9, {"1.0.0", "2.0.0", ".incoming-x"}),
        (-24, {"1.0.0", "2.0.0", ".incoming-x"}),
        (2, {"1.0.0", ".incoming-x"}),
        (25, {"1.0.0"}),
    ):
        assert world.prune().problems == []
        assert world.versions == versions, world.hours
    assert (world.box.state_dir / "bundles/lost+found/1").exists()


def _no_number_in_an_env_file(world):
    (world.box.config_dir / "blue.env").write_text("MODEL_IMAGE=x\n")
    return "names no MODEL_RELEASE"


def _broken_routing(world):
    world.live(1)
    (world.box.routing / "current/blue").unlink()
    return "0 flag files"


@pytest.mark.parametrize("break_it", [_no_number_in_an_env_file, _broken_routing])
def test_nothing_is_removed_where_it_cant_be_told_what_is_in_use(world, break_it):
    for _ in range(3):
        world.release()
    words, before = break_it(world), world.everything
    pruned = world.prune(keep=1)
    assert world.everything == before and pruned.describe() == "nothing to remove"
    (problem,) = pruned.problems
    assert words in problem


def test_a_release_that_cant_be_read_keeps_bundles_and_images(world):
    for _ in range(3):
        world.release()
    (world.box.state_dir / "releases/2/release.json").unlink()
    before = world.everything
    pruned = world.prune(keep=2)
    assert pruned.releases == [1] and world.everything[1:] == before[1:]
    assert "release 2 has no record" in pruned.problems[0]


def test_docker_cant_stop_the_rest(world):
    for _ in range(4):
        world.release()
    world.docker.stuck.add("appliance/model:1")
    pruned = world.prune(keep=2)
    assert pruned.images == ["appliance/model:2"]
    assert pruned.problems == [
        "'docker image rm appliance/model:1' failed: conflict: unable to delete appliance/model:1"
    ]
    world.docker.down = True
    pruned = world.prune(keep=1)
    assert (pruned.releases, len(pruned.bundles), pruned.images) == ([3], 1, [])
    assert "Cannot connect to the Docker daemon" in pruned.problems[0]


def test_docker_isnt_asked_in_a_rollout(world, monkeypatch):
    """Its answer may take minutes, for which the lock would keep a rollback waiting."""
    for _ in range(3):
        world.release()
    present = SimpleNamespace(source_release=1, target_release=2)
    monkeypatch.setattr(plan, "under_way", lambda *_: present)
    monkeypatch.setattr(host, "run", lambda *_: pytest.fail("asked"))
    result = world.engine.prune()
    assert result.ok and "images aren't looked at before the rollout has ended" in result.message


def test_a_signal_says_what_was_removed_before(world, monkeypatch):
    world.box.configure(keep_releases=1)
    world.engine = world.box.engine()
    for _ in range(3):
        world.release()

    def interrupted(*_):
        raise Interrupted("SIGINT")

    monkeypatch.setattr(host, "run", interrupted)
    result = world.engine.prune()
    assert (result.ok, result.changed, result.exit_status, result.details["releases"]) == (False, True, 1, [1, 2])
    assert result.message == "removed 2 releases, 2 bundles; interrupted by SIGINT: run it again for the rest"
    with pytest.raises(Failed, match="interrupted by SIGINT; nothing was removed"):
        world.engine.prune()


def test_a_time_that_isnt_understood_removes_no_image(world):
    for _ in range(2):
        world.release()
    world.docker.images["appliance/model:1"] = ("sha256:1", "yesterday")
    assert "'yesterday'" in world.prune(keep=1).problems[0] and len(world.docker.images) == 2
    with pytest.raises(Failed):
        prune._created("")


def test_nothing_half_removed_bears_a_name_of_its_own(world, monkeypatch):
    for _ in range(2):
        world.release()
    with monkeypatch.context() as patch:
        # As if the power went off before anything was removed.
        patch.setattr(files, "remove_tree", lambda path: None)
        pruned = world.prune(keep=1)
    assert {path.name for path in (world.box.state_dir / "releases").iterdir()} == {".old-1", "2"}
    assert world.versions == {".old-1.0.0", "2.0.0"}
    assert len(pruned.problems) == 2 and "remove it by hand" in pruned.problems[0]
    assert world.prune(keep=1).problems == []
    assert (world.numbers, world.versions) == ({2}, {"2.0.0"})


def test_a_directory_that_cant_be_removed_is_named_and_stops_nothing(world, monkeypatch):
    for _ in range(3):
        world.release()
    real = prune.os.rename

    def rename(source, target):
        if source.name in ("1", "1.0.0"):
            raise OSError(30, "Read-only file system", str(source))
        real(source, target)

    monkeypatch.setattr(prune.os, "rename", rename)
    pruned = world.prune(keep=1)
    assert (pruned.releases, world.numbers, world.versions) == ([2], {1, 3}, {"1.0.0", "3.0.0"})
    assert "releases/1: Read-only file system" in pruned.problems[0]


def test_a_damaged_bundle_goes_once_no_container_has_it_mounted(world, tmp_path, monkeypatch):
    world.release()
    damaged = world.box.state_dir / "bundles/simplemodel/.damaged-x"
    damaged.mkdir()
    proc = tmp_path / "proc/77"
    proc.mkdir(parents=True)
    (tmp_path / "proc/78").mkdir()
    monkeypatch.setattr(prune, "_PROC", tmp_path / "proc")
    row = "612 589 8:1 /var/appliance/bundles/simplemodel/{} /bundle ro,relatime - ext4 /dev/sda1 rw\n"
    (proc / "mountinfo").write_text("22 27 0:21 / /proc rw - proc proc rw\n" + row.format(".damaged-x"))
    world.prune()
    assert damaged.exists()
    (proc / "mountinfo").write_text(row.format("1.0.0"))
    world.prune()
    assert not damaged.exists() and world.versions == {"1.0.0"}
