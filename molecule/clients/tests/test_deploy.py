"""`deploy.yml`: a bundle from a directory or an archive on the idle colour, and what it refuses."""

import hashlib
import io
import shutil
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

PROJECT = Path(__file__).resolve().parents[3]
SOURCE = PROJECT / "bundles/simplemodel/1.1.0"


@pytest.fixture(scope="module", autouse=True)
def afterwards(playbook):
    """What the inventory says, back on the idle colour."""
    yield
    assert playbook("site", "--tags", "releases").returncode == 0


@pytest.fixture
def untouched(edge, engine):
    """Production, the same before and after."""
    before = engine("status")
    yield before
    after = engine("status")
    assert (after["live"], after["state"]) == (before["live"], before["state"])
    assert after["colours"][before["live"]] == before["colours"][before["live"]]
    assert edge.predict().headers["x-model-colour"] == before["live"]


def changed_copy(directory, **fields):
    """A copy of a good bundle with other fields in its manifest, and the right checksums."""
    shutil.copytree(SOURCE, directory)
    manifest = yaml.safe_load((directory / "manifest.yaml").read_text()) | fields
    (directory / "manifest.yaml").write_text(yaml.safe_dump(manifest))
    files = sorted(path for path in directory.iterdir() if path.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (directory / "SHA256SUMS").write_text("".join(lines))
    return directory


def archived(path, source):
    with tarfile.open(path, "w:gz") as archive:
        archive.add(source, arcname=source.name)
    return path


def would_change(playbook, engine, bundle):
    """What check mode says of a bundle that the idle colour doesn't hold; it must say that and change nothing."""
    before = engine("status")
    told = playbook("deploy", "-e", f"bundle={bundle}", "--check")
    assert told.returncode == 0 and "changed=0" not in told.stdout, told.stdout[-3000:]
    assert engine("status") == before
    return " ".join(told.stdout.split())


def test_an_archive_lands_on_the_idle_colour_once(playbook, engine, untouched, tmp_path):
    archive = archived(tmp_path / "model.tar.gz", PROJECT / "bundles/digits/1.0.0")
    assert "digits 1.0.0 " in would_change(playbook, engine, archive)
    assert playbook("deploy", "-e", f"bundle={archive}").returncode == 0
    placed = engine("status")["colours"][untouched["idle"]]
    assert (placed["model"], placed["version"], placed["status"]) == ("digits", "1.0.0", "ready")
    again = playbook("deploy", "-e", f"bundle={archive}")
    assert "changed=0" in again.stdout, again.stdout[-3000:]
    assert engine("status")["colours"][untouched["idle"]]["release"] == placed["release"]
    # Delivered by the inventory: here the engine itself tells.
    live = untouched["colours"][untouched["live"]]["version"]
    version = "1.0.0" if live == "1.1.0" else "1.1.0"
    told = would_change(playbook, engine, SOURCE.with_name(version))
    assert f"would place simplemodel {version} with the image {placed['image']} on" in told


def test_what_is_live_already_leaves_the_way_back_alone(playbook, engine, untouched):
    bundle = SOURCE.with_name(untouched["colours"][untouched["live"]]["version"])
    told = playbook("deploy", "-e", f"bundle={bundle}")
    assert told.returncode == 0 and "changed=0" in told.stdout, told.stdout[-3000:]
    assert "is live already" in told.stdout
    assert engine("status")["colours"] == untouched["colours"]


# What else is refused, tests/unit/test_delivery.py has.
def test_an_archive_that_escapes(playbook, untouched, tmp_path, monkeypatch):
    archive = tmp_path / "model.tar.gz"
    with tarfile.open(archive, "w:gz") as made:
        made.add(SOURCE, arcname="1.1.0")
        outside = tarfile.TarInfo("../../escaped")
        outside.size = 4
        made.addfile(outside, io.BytesIO(b"gone"))
    # Where it is unpacked, so that what escapes would land where this test looks.
    scratch = tmp_path / "a" / "b"
    scratch.mkdir(parents=True)
    monkeypatch.setenv("TMPDIR", str(scratch))
    refused = playbook("deploy", "-e", f"bundle={archive}")
    assert refused.returncode != 0 and "has '..' in its name" in " ".join(refused.stdout.split()), refused.stdout[
        -2000:
    ]
    assert list(tmp_path.rglob("escaped*")) == []
    assert list(scratch.glob("appliance-bundle-*")) == []


def test_a_link_in_a_directory(playbook, untouched, tmp_path):
    broken = changed_copy(tmp_path / "broken")
    (broken / "weights.pth").rename(tmp_path / "weights.pth")
    (broken / "weights.pth").symlink_to(tmp_path / "weights.pth")
    refused = playbook("deploy", "-e", f"bundle={broken}")
    assert refused.returncode != 0 and "links" in refused.stdout, refused.stdout[-2000:]


@pytest.mark.parametrize(
    ("name", "words"), [("bundles", "several bundles"), ("README.md", "neither a directory nor a .tar.gz")]
)
def test_what_is_no_bundle(playbook, untouched, name, words):
    refused = playbook("deploy", "-e", f"bundle={PROJECT / name}")
    assert refused.returncode != 0 and words in refused.stdout, refused.stdout[-2000:]


@pytest.fixture
def torchserve_archive(tmp_path):
    """simplemodel as the real torch-model-archiver packs it, and a request to it."""
    model = (SOURCE / "model.py").read_text().replace("hidden: int)", "hidden: int = 16)")
    (tmp_path / "model.py").write_text(model)
    (tmp_path / "request.json").write_text('{"data": [0.2, 0.6]}')
    (tmp_path / "scratch").mkdir()
    archiver = Path(sys.executable).with_name("torch-model-archiver")
    options = ["--model-name", "moved", "--version", "1.0", "--handler", "base_handler", "--model-file", "model.py"]
    subprocess.run(
        [archiver, *options, "--serialized-file", SOURCE / "weights.pth"],
        cwd=tmp_path,
        env={"TMPDIR": str(tmp_path / "scratch"), "PATH": "/usr/bin:/bin"},
        check=True,
        capture_output=True,
    )
    return tmp_path / "moved.mar"


def test_a_torchserve_archive_lands_on_the_idle_colour(playbook, engine, edge, untouched, torchserve_archive):
    example = torchserve_archive.with_name("request.json")
    options = ["-e", f"example={example}", "-e", "import_options='--input-shape 2'"]
    told = playbook("deploy", "-e", f"bundle={torchserve_archive}", *options)
    assert told.returncode == 0, told.stdout[-3000:]
    assert engine("status")["colours"][untouched["idle"]]["model"] == "moved"
    answer = edge.request("POST", "/test/predictions/moved", b"[[0.2, 0.6]]", {"Content-Type": "application/json"})
    assert answer.status == 200, answer.text


def test_a_torchserve_archive_needs_an_example(playbook, untouched, torchserve_archive):
    refused = playbook("deploy", "-e", f"bundle={torchserve_archive}")
    assert refused.returncode != 0 and "-e example=FILE" in refused.stdout


def test_what_isnt_a_torchserve_archive(playbook, untouched, tmp_path):
    (tmp_path / "model.mar").write_bytes(b"PK")
    refused = playbook("deploy", "-e", f"bundle={tmp_path / 'model.mar'}", "-e", "example={}")
    assert refused.returncode != 0 and "error:" in refused.stdout


def test_no_bundle_named(playbook, untouched):
    refused = playbook("deploy")
    assert refused.returncode != 0 and "-e bundle=PATH" in refused.stdout


def test_a_host_without_the_engine_is_told_to_be_provisioned(host, playbook, untouched):
    host.check_output("mv /usr/local/bin/appliance /usr/local/bin/appliance.away")
    try:
        refused = playbook("deploy", "-e", f"bundle={SOURCE}")
    finally:
        host.check_output("mv /usr/local/bin/appliance.away /usr/local/bin/appliance")
    assert refused.returncode != 0 and "run playbooks/site.yml first" in refused.stdout, refused.stdout[-2000:]


def test_what_is_damaged_here_or_there_and_two_that_deliver_at_once(host, playbook, engine, untouched, tmp_path):
    bundle = changed_copy(tmp_path / "bundle", version="9.9.9")
    good = (bundle / "weights.pth").read_bytes()
    (bundle / "weights.pth").write_bytes(good[:-1] + b"x")
    refused = playbook("deploy", "-e", f"bundle={bundle}")
    assert refused.returncode != 0, refused.stdout[-2000:]
    assert "weights.pth isn't what SHA256SUMS says" in " ".join(refused.stdout.split())
    delivered = "/var/lib/appliance/bundles/simplemodel"
    assert not host.file(f"{delivered}/9.9.9").exists
    # What an interrupted run left, and what a third run is at just now.
    host.check_output(f"mkdir {delivered}/.incoming-old {delivered}/.incoming-new")
    host.check_output(f"touch --date '-2 days' {delivered}/.incoming-old")
    (bundle / "weights.pth").write_bytes(good)
    with ThreadPoolExecutor() as pool:
        runs = list(pool.map(lambda _: playbook("deploy", "-e", f"bundle={bundle}"), range(2)))
    assert 0 in [run.returncode for run in runs], runs[0].stdout[-3000:]
    # The engine has one lock: the other run may have met it.
    assert all(run.returncode == 0 or "lock" in run.stdout for run in runs), [run.stdout[-2000:] for run in runs]
    assert engine("status")["colours"][untouched["idle"]]["version"] == "9.9.9"
    host.check_output(f"cd {delivered}/9.9.9 && sha256sum --check --strict SHA256SUMS")
    assert host.check_output(f"find {delivered} -name '.incoming-*' -printf '%f '").split() == [".incoming-new"]
    host.check_output(f"rmdir {delivered}/.incoming-new")
    host.check_output(f"truncate --size 0 {delivered}/9.9.9/weights.pth")
    told = playbook("deploy", "-e", f"bundle={bundle}")
    assert told.returncode == 0 and "is damaged on the host" in " ".join(told.stdout.split()), told.stdout[-3000:]
    host.check_output(f"cd {delivered}/9.9.9 && sha256sum --check --strict SHA256SUMS")
    assert engine("status")["colours"][untouched["idle"]]["status"] == "ready"
