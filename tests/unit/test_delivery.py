"""How a bundle gets from the controller to the host, and what of it reaches the engine: the role's own tasks, run here.

`appliance`, `sync` and `mv` are stand-ins on PATH that write down how they were called: the first answers as the test
wants, the last does it.
"""

import errno
import gzip
import hashlib
import io
import json
import os
import resource
import runpy
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import jinja2
import pytest
import yaml

PROJECT = Path(__file__).resolve().parents[2]
SOURCE = PROJECT / "bundles/simplemodel/1.1.0"
ANSIBLE = Path(sys.executable).with_name("ansible-playbook")
CALLED = """#!/bin/sh
printf '%s' "${{0##*/}}" >>{root}/calls
printf ' %s' "$@" >>{root}/calls
echo >>{root}/calls
"""
APPLIANCE = """case "$*" in *--dry-run*) cat {root}/dry.json ;; *) cat {root}/done.json ;; esac
"""
PLACED = {"ok": True, "changed": True, "pending": False, "colour": "green", "message": "green holds it"}
WOULD = {"ok": True, "changed": False, "pending": False, "would_change": True, "message": "would place it"}
IS_LIVE = {
    "ok": True,
    "changed": False,
    "pending": False,
    "message": "simplemodel 1.1.0 is live already: nothing to do",
}
LIVES = {"rollout_live": "blue"}

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="a host's files belong to root")


def seal(directory):
    files = sorted(path for path in directory.iterdir() if path.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (directory / "SHA256SUMS").write_text("".join(lines))


class Site:
    """A controller and its host, both here."""

    def __init__(self, root):
        self.root, self.state = root, root / "state"
        self.bundles = self.state / "bundles"
        self.bundles.mkdir(parents=True)
        self.delivered = self.bundles / "simplemodel/1.1.0"
        self.source = root / "work/1.1.0"
        shutil.copytree(SOURCE, self.source)
        (root / "files").symlink_to(PROJECT / "playbooks/files")
        self.bin = root / "bin"
        self.bin.mkdir()
        move = f'exec {shutil.which("mv")} "$@"\n'
        for name, text in {"appliance": APPLIANCE, "mv": move, "sync": "", "docker": "exit 1\n"}.items():
            (self.bin / name).write_text((CALLED + text).format(root=root))
            (self.bin / name).chmod(0o755)
        self.answers()

    def answers(self, dry=WOULD, done=PLACED):
        (self.root / "dry.json").write_text(json.dumps(dry) + "\n")
        (self.root / "done.json").write_text(json.dumps(done) + "\n")

    def play(self, *tasks, check=False, **variables):
        """The output of Ansible, in one line, and its exit status."""
        host = {"ansible_connection": "local", "ansible_become": False, "ansible_python_interpreter": sys.executable}
        host |= {"rollout_state_dir": str(self.state), "rollout_image": "appliance/model:1"}
        (self.root / "hosts.yml").write_text(yaml.safe_dump({"all": {"hosts": {"here": host | variables}}}))
        play = [{"hosts": "all", "gather_facts": False, "tasks": list(tasks)}]
        (self.root / "play.yml").write_text(yaml.safe_dump(play))
        (self.root / "calls").write_text("")
        answer = subprocess.run(
            [ANSIBLE, "-i", self.root / "hosts.yml", self.root / "play.yml", *(["--check"] if check else [])],
            cwd=self.root,
            env={
                "PATH": f"{self.bin}:{ANSIBLE.parent}:/usr/bin:/bin",
                "HOME": str(self.root),
                "PWD": str(self.root),
                "TMPDIR": str(self.root),
                "USER": "carol",
                "ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg"),
                "LC_ALL": "C.UTF-8",
            },
            capture_output=True,
            text=True,
            timeout=300,
        )
        return " ".join((answer.stdout + answer.stderr).split()), answer.returncode

    def place(self, check=False, **variables):
        task = {"name": "rollout", "tasks_from": "place_one.yml"}
        variables = {"rollout_source": str(self.source), "rollout_colour": "green"} | variables
        return self.play({"ansible.builtin.include_role": task, "vars": variables}, check=check)

    def find(self, bundle):
        """What find_bundle.yml makes of `bundle`, handed on to the role as deploy.yml does it."""
        tasks = [
            {"ansible.builtin.import_tasks": str(PROJECT / "playbooks/tasks/find_bundle.yml")},
            {
                "ansible.builtin.include_role": {"name": "rollout", "tasks_from": "place_one.yml"},
                "vars": {
                    "rollout_source": "{{ deploy_directory }}",
                    "rollout_given": "{{ deploy_given }}",
                    "rollout_colour": "green",
                },
            },
        ]
        return self.play(*tasks, bundle=str(bundle))

    def calls(self, *programs):
        lines = (self.root / "calls").read_text().splitlines()
        return [line for line in lines if line.split(" ")[0] in programs]

    def check_delivered(self, directory):
        names = sorted(path.name for path in SOURCE.iterdir() if path.is_file())
        assert sorted(path.name for path in directory.iterdir()) == names
        assert all((directory / name).read_bytes() == (SOURCE / name).read_bytes() for name in names)
        assert directory.stat().st_mode & 0o777 == 0o755


@pytest.fixture
def site(tmp_path):
    # The checkout may hold more than is in git.
    return Site(tmp_path)


def test_a_bundle_is_on_the_disk_before_its_name_is(site):
    told, status = site.place()
    assert status == 0, told
    site.check_delivered(site.delivered)
    calls = site.calls("sync", "mv")
    [first, *_] = calls
    incoming = first.split()[1]
    assert "/simplemodel/.incoming-" in incoming
    names = {f"{incoming}/{path.name}" for path in site.delivered.iterdir()}
    assert first.split()[0] == "sync" and set(first.split()[1:]) == names | {incoming}
    assert calls[1:] == [f"mv --no-target-directory {incoming} {site.delivered}", "sync . .."]
    # The second time there is nothing to deliver.
    told, status = site.place()
    assert status == 0 and site.calls("sync", "mv") == [], told
    assert [path.name for path in site.delivered.parent.iterdir()] == ["1.1.0"]


def cut(path):
    path.write_bytes(b"")


DAMAGES = {
    "weights": lambda bundle: cut(bundle / "weights.pth"),
    "a file that is gone": lambda bundle: (bundle / "model.py").unlink(),
    "checksums": lambda bundle: cut(bundle / "SHA256SUMS"),
    "a checksum": lambda bundle: (bundle / "SHA256SUMS").write_text((bundle / "SHA256SUMS").read_text()[1:]),
    "no checksums": lambda bundle: (bundle / "SHA256SUMS").unlink(),
    "a line less": lambda bundle: (bundle / "SHA256SUMS").write_text(
        "".join((bundle / "SHA256SUMS").read_text().splitlines(keepends=True)[:-1])
    ),
}


def script(tasks, name, **variables):
    """The shell script of a task of the role, as Ansible renders it."""
    listed = yaml.safe_load((PROJECT / "roles/rollout/tasks" / tasks).read_text())
    listed += [task for outer in listed for task in outer.get("block", [])]
    [task] = [task for task in listed if task["name"].startswith(name)]
    role = yaml.safe_load((PROJECT / "roles/rollout/vars/main.yml").read_text())
    environment = jinja2.Environment()
    environment.filters |= {"quote": shlex.quote, "dirname": os.path.dirname}
    return environment.from_string(task["ansible.builtin.shell"]["cmd"]).render(role | variables)


def look(directory, state=Path("/nowhere")):
    """What delivered.yml finds there."""
    rendered = script(
        "delivered.yml", "Look on the host", rollout_bundle={"path": str(directory)}, rollout_state_dir=str(state)
    )
    return subprocess.run(["/bin/sh", "-c", rendered], capture_output=True, text=True, check=True, timeout=60)


STAT = """#!/bin/sh
for place; do :; done
case $1 in
  --file-system) [ "$place" = {passing} ] && echo {free} 1 || echo 1050000 1 ;;
  *) [ "$place" = {passing} ] && echo 2 || echo 1 ;;
esac
"""


def room(root, size, *, largest=1000, free=0, passing="~/tmp"):
    """What room.yml says of a host with 1.05 MB for bundles, and another file system with `free` bytes."""
    (root / "bin").mkdir(exist_ok=True)
    (root / "bin/stat").write_text(STAT.format(passing=root / "tmp", free=free))
    (root / "bin/stat").chmod(0o755)
    rendered = script(
        "room.yml",
        "Look for room",
        rollout_bundle={"name": "simplemodel", "version": "1.1.0", "size": size, "largest": largest},
        rollout_state_dir=str(root / "state dir"),
        ansible_remote_tmp=passing,
    )
    environment = {"HOME": str(root), "PATH": f"{root}/bin:/usr/bin:/bin"}
    answer = subprocess.run(["/bin/sh", "-ec", rendered], capture_output=True, text=True, timeout=60, env=environment)
    assert (answer.returncode, answer.stderr) == (0, "")
    return " ".join(answer.stdout.split())


def test_a_bundle_without_room_is_refused(tmp_path):
    # Nothing is there yet.
    assert room(tmp_path, 1_000_000) == ""
    said = f"simplemodel 1.1.0 needs 2 MB in {tmp_path}, where 1 MB are free."
    assert (
        room(tmp_path, 1_000_001) == f"{said} On the host, 'sudo appliance prune' removes what nothing needs any more."
    )
    bundles = tmp_path / "state dir/bundles"
    (bundles / "simplemodel/.incoming-x").mkdir(parents=True)
    said = room(tmp_path, 50_000_000_000)
    assert said.startswith(f"simplemodel 1.1.0 needs 52500 MB in {bundles}, where 1 MB are free. On the host, ")
    assert said.endswith(f": {bundles}/simplemodel/.incoming-x. Remove those that no run is at.")


def test_the_place_that_files_pass_through_has_room_too(tmp_path):
    assert room(tmp_path, 20_000, largest=10_000) == "", "on the same file system"
    (tmp_path / "tmp").mkdir()
    assert room(tmp_path, 20_000, largest=10_000, free=10_500) == ""
    for passing in ("~/tmp", f"{tmp_path}/tmp/x/y"):
        said = room(tmp_path, 20_000, largest=10_000, free=10_499, passing=passing)
        assert said.startswith(f"simplemodel 1.1.0 needs 1 MB in {tmp_path}/tmp, where 0 MB are free. Files pass")


def test_only_what_is_to_be_delivered_needs_room():
    tasks = yaml.safe_load((PROJECT / "roles/rollout/tasks/place_one.yml").read_text())
    included = [task.get("ansible.builtin.include_tasks") for task in tasks]
    assert included.index("delivered.yml") < included.index("room.yml") < included.index("deliver.yml")
    # In check mode too.
    assert tasks[included.index("room.yml")]["when"] == "rollout_delivered.stdout is not match('whole')"


def test_the_size_of_a_bundle_is_known(tmp_path):
    bundle = tmp_path / "bundle"
    shutil.copytree(SOURCE, bundle)
    before = describe(bundle)
    (bundle / "deeper").mkdir()
    (bundle / "deeper/x").write_bytes(bytes(1_000_001))
    after = describe(bundle)
    assert after["size"] - before["size"] == after["largest"] == 245 * 4096
    assert {key: after[key] for key in ("name", "version")} == {"name": "simplemodel", "version": "1.1.0"}


@pytest.mark.parametrize("name", ["squeezenet1_1", "MyModel"])
def test_names_that_torchserve_has_are_kept(tmp_path, name):
    bundle = tmp_path / "bundle"
    shutil.copytree(SOURCE, bundle)
    field("name", name)(bundle)
    assert describe(bundle)["name"] == name


def describe(bundle):
    program = PROJECT / "roles/rollout/files/describe_bundle.py"
    return json.loads(subprocess.check_output([sys.executable, program, bundle], timeout=60))


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_seen(tmp_path, damage):
    bundle = tmp_path / "bundle"
    assert look(bundle).stdout == "missing\n"
    shutil.copytree(SOURCE, bundle)
    digest = hashlib.sha256((bundle / "SHA256SUMS").read_bytes()).hexdigest()
    assert look(bundle).stdout.split() == ["whole", digest]
    DAMAGES[damage](bundle)
    answer = look(bundle)
    assert answer.stdout == "damaged\n" and answer.stderr.strip()


def record(state, number, bundle, digest):
    (state / f"releases/{number}").mkdir(parents=True)
    text = json.dumps({"bundle": str(bundle), "bundle_digest": f"sha256:{digest}"}, indent=1)
    (state / f"releases/{number}/release.json").write_text(text)


def test_releases_say_what_a_damaged_bundle_was(tmp_path):
    bundle = tmp_path / "bundle"
    shutil.copytree(SOURCE, bundle)
    cut(bundle / "SHA256SUMS")
    record(tmp_path, 1, bundle, "a1")
    record(tmp_path, 2, tmp_path / "other", "b2")
    record(tmp_path, 3, bundle, "a1")
    (tmp_path / "releases/4").mkdir()
    (tmp_path / "releases/4/release.json").write_text("{")
    assert look(bundle, tmp_path).stdout == "damaged a1\n"


def put(model):
    """What deliver.yml does at the end, where `.incoming-x` is to become `1`."""
    rendered = script(
        "deliver.yml",
        "Put the bundle",
        rollout_bundle={"path": str(model / "1")},
        rollout_incoming={"path": str(model / ".incoming-x")},
    )
    return subprocess.run(["/bin/sh", "-c", rendered], cwd=model, capture_output=True, text=True, timeout=60)


def test_what_another_run_delivered_meanwhile_stays(tmp_path):
    for name in ("1", ".incoming-x"):
        shutil.copytree(SOURCE, tmp_path / name)
    there = (tmp_path / "1").stat().st_ino
    answer = put(tmp_path)
    assert (answer.returncode, answer.stdout) == (0, "") and (tmp_path / "1").stat().st_ino == there
    cut(tmp_path / "1/weights.pth")
    answer = put(tmp_path)
    assert (answer.returncode, answer.stdout) == (0, "placed\n"), answer.stderr
    assert (tmp_path / "1").stat().st_ino != there and (tmp_path / ".damaged-x").stat().st_ino == there


def test_what_cannot_be_replaced_comes_back(tmp_path):
    shutil.copytree(SOURCE, tmp_path / "1")
    cut(tmp_path / "1/weights.pth")
    there = (tmp_path / "1").stat().st_ino
    answer = put(tmp_path)
    assert answer.returncode == 1 and "mv: " in answer.stderr
    assert (tmp_path / "1").stat().st_ino == there and not (tmp_path / ".damaged-x").exists()


def test_what_is_damaged_on_the_host_is_delivered_again(site):
    shutil.copytree(SOURCE, site.delivered)
    DAMAGES["weights"](site.delivered)
    before = {path.name: (path.stat().st_ino, path.read_bytes()) for path in site.delivered.iterdir()}
    told, status = site.place()
    assert status == 0, told
    assert f"{site.delivered} is damaged on the host" in told and "containers that run keep the files" in told
    site.check_delivered(site.delivered)
    # What a container has mounted is as it was, under another name.
    [left] = [path for path in site.delivered.parent.iterdir() if path.name != "1.1.0"]
    assert left.name.startswith(".damaged-")
    assert {path.name: (path.stat().st_ino, path.read_bytes()) for path in left.iterdir()} == before


def test_what_changes_after_it_was_checked_is_not_delivered(site):
    place = {"name": "rollout", "tasks_from": "place_one.yml"}
    told, status = site.play(
        {"ansible.builtin.include_role": place | {"tasks_from": "check.yml"}},
        {"ansible.builtin.shell": f"cd {site.source} && echo >>model.py && sha256sum [a-z]* >SHA256SUMS"},
        {"ansible.builtin.include_role": place},
        rollout_source=str(site.source),
        rollout_colour="green",
    )
    assert status == 2 and f"{site.source} was changed after it was checked: run the playbook again." in told, told
    assert site.calls("appliance") == [] and list(site.delivered.parent.iterdir()) == []


def test_check_mode_says_what_is_damaged_and_leaves_it(site):
    shutil.copytree(SOURCE, site.delivered)
    cut(site.delivered / "weights.pth")
    told, status = site.place(check=True)
    assert status == 0 and "weights.pth: FAILED" in told and "would be delivered again" in told, told
    assert "changed=0" not in told
    assert (site.delivered / "weights.pth").read_bytes() == b"" and site.calls("mv", "appliance") == []


@pytest.mark.parametrize("state", ["whole", "damaged"])
def test_what_has_other_content_stays(site, state):
    shutil.copytree(SOURCE, site.delivered)
    (site.delivered / "model.py").write_text("# other\n")
    seal(site.delivered)
    if state == "damaged":
        record(site.state, 1, site.delivered, hashlib.sha256((site.delivered / "SHA256SUMS").read_bytes()).hexdigest())
        cut(site.delivered / "SHA256SUMS")
    told, status = site.place()
    assert status == 2 and "is on the host already, with other content" in told and "new version" in told, told
    assert site.calls("mv", "appliance") == [] and (site.delivered / "model.py").read_text() == "# other\n"


@pytest.mark.parametrize("edited", [False, True])
def test_an_archive_is_recorded_as_where_it_lies(site, edited):
    git = ["git", "-C", str(site.root / "work"), "-c", "user.name=x", "-c", "user.email=x@localhost"]
    subprocess.run([*git, "init", "-q"], check=True)
    sources = site.root / "work/train.py"
    sources.write_text("# committed\n")
    subprocess.run([*git, "add", sources.name], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "x"], check=True)
    # A tag, which is not the revision.
    subprocess.run([*git, "tag", "-a", "-m", "x", "v1"], check=True)
    revision = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    if edited:
        sources.write_text("# not committed\n")
        revision += "-dirty"
    archive = site.root / "work/model.tar.gz"
    with tarfile.open(archive, "w:gz") as made:
        made.add(site.source, arcname="1.1.0")
    left = {age: site.root / f"appliance-bundle-{age}" for age in (0, 2)}
    for days, directory in left.items():
        (directory / "1.1.0").mkdir(parents=True)
        os.utime(directory, (time.time() - days * 86400 - 60,) * 2)
    told, status = site.find(archive)
    assert status == 0, told
    assert left[0].is_dir() and not left[2].exists(), "of a run that may be under way, and of one that was broken off"
    [call] = site.calls("appliance")
    assert f":{archive} --revision {revision} --who carol" in call


@pytest.mark.parametrize(("status", "goes_on"), [(1, True), (127, False)])
def test_leftovers_that_cannot_be_removed_are_told_and_hinder_nothing(site, status, goes_on):
    archive = site.root / "model.tar.gz"
    with tarfile.open(archive, "w:gz") as made:
        made.add(site.source, arcname="1.1.0")
    (site.bin / "find").write_text(f'#!/bin/sh\necho "find: it is kept" >&2\nexit {status}\n')
    (site.bin / "find").chmod(0o755)
    find = {"ansible.builtin.import_tasks": str(PROJECT / "playbooks/tasks/find_bundle.yml")}
    told, ended = site.play(find, bundle=str(archive))
    assert (ended == 0) is goes_on, told
    assert ("could be removed: find: it is kept. Remove it by hand." in told) is goes_on


def unpack(archive, directory):
    program = PROJECT / "playbooks/files/unpack_bundle.py"
    directory.mkdir()
    return subprocess.run([sys.executable, program, archive, directory], capture_output=True, text=True, timeout=60)


def archived(path, *members):
    """An archive of the bundle, and members besides it; in the middle, so that a part of it comes after them."""
    with tarfile.open(path, "w:gz") as made:
        made.add(SOURCE / "model.py", arcname="./1.1.0/model.py")
        for about in members:
            about.size = 4 if about.isreg() else 0
            made.addfile(about, io.BytesIO(b"gone"))
        made.add(SOURCE, arcname="1.1.0")
    return path


def member(name, kind=tarfile.REGTYPE, target=""):
    about = tarfile.TarInfo(name)
    about.type, about.linkname = kind, target
    return about


@pytest.mark.parametrize("mode", ["gz", ""])
def test_an_archive_is_unpacked_as_it_is(tmp_path, mode):
    with tarfile.open(tmp_path / "model.tar.gz", f"w:{mode}") as made:
        made.add(SOURCE, arcname="1.1.0")
    answer = unpack(tmp_path / "model.tar.gz", tmp_path / "unpacked")
    assert (answer.returncode, answer.stderr) == (0, "")
    names = sorted(path.relative_to(SOURCE) for path in SOURCE.rglob("*") if path.is_file())
    found = tmp_path / "unpacked/1.1.0"
    assert sorted(path.relative_to(found) for path in found.rglob("*") if path.is_file()) == names
    assert all((found / name).read_bytes() == (SOURCE / name).read_bytes() for name in names)


INTRUDERS = {
    "absolute": (lambda root: member(f"{root}/escaped"), "{root}/escaped' has an absolute name"),
    "above": (lambda root: member("1.1.0/../../escaped"), "'1.1.0/../../escaped' has '..' in its name"),
    "a link": (lambda root: member("1.1.0/x", tarfile.SYMTYPE, "/etc/shadow"), "'1.1.0/x' is a link"),
    "a hard link": (lambda root: member("1.1.0/x", tarfile.LNKTYPE, "1.1.0/model.py"), "'1.1.0/x' is a link"),
    "a device": (lambda root: member("1.1.0/x", tarfile.CHRTYPE), "'1.1.0/x' is neither a file nor a directory"),
    "a pipe": (lambda root: member("1.1.0/x", tarfile.FIFOTYPE), "'1.1.0/x' is neither a file nor a directory"),
    "odd": (lambda root: member("../\x1b[2J\n"), "its member '../\\x1b[2J\\n' has '..' in its name"),
}


@pytest.mark.parametrize("intruder", INTRUDERS)
def test_what_doesnt_belong_into_an_archive_is_refused(tmp_path, intruder):
    make, words = INTRUDERS[intruder]
    archive = archived(tmp_path / "model.tar.gz", make(tmp_path))
    (tmp_path / "a").mkdir()
    answer = unpack(archive, tmp_path / "a/b")
    assert answer.returncode == 1 and answer.stderr.count("\n") == 1
    assert answer.stderr.startswith(f"{archive} can't be a bundle") and words.format(root=tmp_path) in answer.stderr
    assert not list(tmp_path.rglob("escaped*")) and not list(tmp_path.rglob("x"))


def cut_off(content):
    return content[:-200]


def without_checksum(content):
    return content[:-4]


def with_a_changed_byte(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]


def with_a_broken_head(content):
    members = bytearray(gzip.decompress(content))
    # The second member's.
    members[members.index(b"1.1.0\0") if b"1.1.0\0" in members else members.index(b"1.1.0/\0")] ^= 1
    return gzip.compress(bytes(members))


def nothing(content):
    return b""


def other(content):
    return b"PK\3\4" + bytes(1000)


@pytest.mark.parametrize("damage", [cut_off, without_checksum, with_a_changed_byte, with_a_broken_head, nothing, other])
def test_an_archive_that_is_damaged_is_refused(tmp_path, damage):
    archive = archived(tmp_path / "model.tar.gz")
    archive.write_bytes(damage(archive.read_bytes()))
    answer = unpack(archive, tmp_path / "unpacked")
    assert answer.returncode == 1 and answer.stderr.count("\n") == 1
    assert answer.stderr.startswith(f"{archive} can't be read to its end: it is")


def test_an_archive_without_room_says_where_it_would_have_some(tmp_path):
    program = runpy.run_path(str(PROJECT / "playbooks/files/unpack_bundle.py"))
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    said = str(program["_unwritable"](tmp_path / "model.tar.gz", member("x"), tmp_path, full))
    assert said.endswith("No space left on device; free some space there, or set TMPDIR to another place for it")


def test_an_archive_that_has_no_place_is_refused(tmp_path):
    archive = archived(tmp_path / "model.tar.gz", member("1.1.0/x"), member("1.1.0/x/y"))
    answer = unpack(archive, tmp_path / "unpacked")
    assert answer.returncode == 1 and answer.stderr.count("\n") == 1
    assert f"{archive} can't be unpacked to {tmp_path}/unpacked: its member '1.1.0/x/y': " in answer.stderr


@pytest.mark.parametrize("check", [False, True])
def test_what_is_live_already_isnt_placed_again(site, check):
    shutil.copytree(SOURCE, site.delivered)
    site.answers(dry=IS_LIVE)
    told, status = site.place(check, **LIVES)
    assert status == 0 and "simplemodel 1.1.0 is live already: nothing to do" in told, told
    assert "changed=0" in told
    [call] = site.calls("appliance")
    assert call.startswith("appliance deploy blue ") and "--dry-run" in call


@pytest.mark.parametrize("answer", [IS_LIVE | {"pending": True}, {}], ids=["other", "no answer"])
def test_what_is_live_otherwise_is_placed(site, answer):
    shutil.copytree(SOURCE, site.delivered)
    site.answers(dry=answer)
    told, status = site.place(**LIVES)
    assert status == 0 and "green holds it" in told, told
    assert [call.split()[2] for call in site.calls("appliance")] == ["blue", "green"]


def test_deploy_asks_where_the_live_colour_has_the_bundle():
    [play] = yaml.safe_load((PROJECT / "playbooks/deploy.yml").read_text())
    [block] = [task["block"] for task in play["tasks"] if "block" in task]
    [given] = [task["vars"] for task in block if task["name"] == "Place the release"]
    bundle = {"path": "/b/simplemodel/1.1.0"}
    for live, held, wanted in (
        ("blue", "/b/simplemodel/1.1.0", "blue"),
        ("blue", "/b/simplemodel/1.0.0", ""),
        ("blue", None, ""),
        (None, "/b/simplemodel/1.1.0", ""),
    ):
        told = {"live": live, "colours": {"blue": {"bundle": held}}}
        asked = jinja2.Template(given["rollout_live"]).render(deploy_told=told, rollout_bundle=bundle)
        assert asked == wanted, (live, held)
    assert given["rollout_given"] == "{{ deploy_given }}"


def field(name, value):
    def change(bundle):
        about = yaml.safe_load((bundle / "manifest.yaml").read_text())
        about.pop(name)
        (bundle / "manifest.yaml").write_text(yaml.safe_dump(about if value is None else about | {name: value}))

    return change


def in_place_of(name, make):
    def change(bundle):
        (bundle / name).unlink()
        make(bundle / name)

    return change


def link(path):
    """To a file that is none of the bundle's."""
    (path.parent.parent / "secret").write_text("[ a key")
    path.symlink_to("../secret")


MISTAKES = {
    "no name": (field("name", None), "{}/manifest.yaml: name is missing: it must be letters"),
    "no version": (field("version", None), "{}/manifest.yaml: version is missing: it must be letters"),
    "a name of its own": (field("name", "../x"), "{}/manifest.yaml: name must be letters"),
    "a number": (field("version", 1.5), "{}/manifest.yaml: version must be letters, digits"),
    "no YAML": (
        lambda bundle: (bundle / "manifest.yaml").write_text("name: [a\n"),
        "{}/manifest.yaml isn't valid YAML: while parsing",
    ),
    "no date": (
        lambda bundle: (bundle / "manifest.yaml").write_text("version: 2024-13-45\n"),
        "{}/manifest.yaml isn't valid YAML: month must be in 1..12",
    ),
    "a date": (
        lambda bundle: (bundle / "manifest.yaml").write_text("2024-12-24\n"),
        "{}/manifest.yaml must hold fields such as 'name: simplemodel', not \"2024-12-24\"",
    ),
    "no fields": (
        lambda bundle: (bundle / "manifest.yaml").write_text("- a\n"),
        "{}/manifest.yaml must hold fields",
    ),
    "no manifest": (lambda bundle: (bundle / "manifest.yaml").unlink(), "{}/manifest.yaml is missing"),
    "no checksums": (
        lambda bundle: (bundle / "SHA256SUMS").unlink(),
        '{0}/SHA256SUMS is missing: `make bundle ARGS="sums DIRECTORY"`',
    ),
    "no text": (lambda bundle: (bundle / "SHA256SUMS").write_bytes(b"\xff"), "{}/SHA256SUMS isn't text in UTF-8"),
    "a linked manifest": (in_place_of("manifest.yaml", link), "{}/manifest.yaml must be a regular file; it is a link"),
    "linked checksums": (in_place_of("SHA256SUMS", link), "{}/SHA256SUMS must be a regular file; it is a link"),
    "checksums without end": (
        in_place_of("SHA256SUMS", lambda path: path.symlink_to("/dev/zero")),
        "{}/SHA256SUMS must be a regular file",
    ),
    "a pipe": (in_place_of("SHA256SUMS", os.mkfifo), "{}/SHA256SUMS must be a regular file"),
    "a directory": (in_place_of("manifest.yaml", os.mkdir), "{}/manifest.yaml must be a regular file"),
    "many checksums": (
        lambda bundle: os.truncate(bundle / "SHA256SUMS", 5 << 20),
        "{}/SHA256SUMS is larger than 4 MiB",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_bundle_is_named(tmp_path, mistake):
    change, words = MISTAKES[mistake]
    source = tmp_path / "bundle"
    shutil.copytree(SOURCE, source)
    change(source)
    program = PROJECT / "roles/rollout/files/describe_bundle.py"
    answer = subprocess.run(
        [sys.executable, program, source], capture_output=True, text=True, timeout=10, preexec_fn=little_memory
    )
    assert (answer.returncode, answer.stdout) == (1, "") and words.format(source) in answer.stderr
    assert answer.stderr.count("\n") == 1, "one line"
    assert "key" not in answer.stderr


def little_memory():
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))


def test_a_refused_link_shows_nothing_of_what_it_leads_to():
    listed = yaml.safe_load((PROJECT / "roles/rollout/tasks/check.yml").read_text())
    [block] = [task["block"] for task in listed if "block" in task]
    [number] = [number for number, task in enumerate(block) if "links" in task.get("vars", {})]
    # Before, only what describe_bundle.py said was judged, which reads nothing through a link. The sentence can be made
    # without the bundle's own files.
    assert [task["name"] for task in block[:number] if "ansible.builtin.assert" in task] == ["Check its manifest"]
    check, variables = block[number]["ansible.builtin.assert"], block[number]["vars"]
    assert check["that"] == "links | length == 0" and "lookup" not in str(block[number])
    files = [{"isreg": False, "isdir": False, "path": "/b/SHA256SUMS"}, {"isreg": True, "isdir": False, "path": "/b/x"}]
    links = jinja2.Environment().compile_expression(variables["links"].strip("{} "))(rollout_files={"files": files})
    said = jinja2.Template(check["fail_msg"]).render(rollout_source="/b", links=list(links))
    assert said.strip() == "/b must hold regular files only; links and the like: /b/SHA256SUMS."


def test_a_mistake_in_a_bundle_is_all_that_is_said(site):
    change, words = MISTAKES["no YAML"]
    change(site.source)
    told, status = site.place()
    assert status == 2 and words.format(site.source) in told, told
    assert "emplat" not in told and "Traceback" not in told
    assert site.calls("appliance") == [] and list(site.bundles.iterdir()) == []
