"""`deploy.yml`: a bundle from a directory or an archive on the idle colour, and what it refuses."""

import io
import shutil
import tarfile

import pytest
import yaml
from conftest import PROJECT

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


def archived(path, source):
    with tarfile.open(path, "w:gz") as archive:
        archive.add(source, arcname=source.name)
    return path


def test_an_archive_lands_on_the_idle_colour_once(playbook, engine, untouched, tmp_path):
    archive = archived(tmp_path / "model.tar.gz", PROJECT / "bundles/digits/1.0.0")
    told = playbook("deploy", "-e", f"bundle={archive}", "--check")
    assert told.returncode == 0, told.stdout[-3000:]
    assert engine("status")["colours"][untouched["idle"]] == untouched["colours"][untouched["idle"]]
    assert playbook("deploy", "-e", f"bundle={archive}").returncode == 0
    placed = engine("status")["colours"][untouched["idle"]]
    assert (placed["model"], placed["version"], placed["status"]) == ("digits", "1.0.0", "ready")
    again = playbook("deploy", "-e", f"bundle={archive}")
    assert "changed=0" in again.stdout, again.stdout[-3000:]
    assert engine("status")["colours"][untouched["idle"]]["release"] == placed["release"]


def test_a_truncated_archive(playbook, untouched, tmp_path):
    archive = archived(tmp_path / "model.tar.gz", SOURCE)
    archive.write_bytes(archive.read_bytes()[:-200])
    refused = playbook("deploy", "-e", f"bundle={archive}")
    assert refused.returncode != 0 and "gzip" in refused.stdout


def test_an_archive_that_escapes(playbook, untouched, tmp_path):
    archive = tmp_path / "model.tar.gz"
    with tarfile.open(archive, "w:gz") as made:
        made.add(SOURCE, arcname="1.1.0")
        outside = tarfile.TarInfo("../../escaped")
        outside.size = 4
        made.addfile(outside, io.BytesIO(b"gone"))
        link = tarfile.TarInfo("1.1.0/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        made.addfile(link)
    refused = playbook("deploy", "-e", f"bundle={archive}")
    assert refused.returncode != 0
    assert not list(tmp_path.parent.rglob("escaped"))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing-there", "doesn't exist"),
        ("bundles", "several bundles"),
        ("docs", "no manifest.yaml"),
        ("README.md", "neither a directory nor a .tar.gz"),
    ],
)
def test_what_is_no_bundle(playbook, untouched, name, words):
    refused = playbook("deploy", "-e", f"bundle={PROJECT / name}")
    assert refused.returncode != 0 and words in refused.stdout, refused.stdout[-2000:]


def test_a_torchserve_archive_is_told_what_to_do(playbook, untouched, tmp_path):
    (tmp_path / "model.mar").write_bytes(b"PK")
    refused = playbook("deploy", "-e", f"bundle={tmp_path / 'model.mar'}")
    assert refused.returncode != 0 and "make bundle" in refused.stdout


def test_no_bundle_named(playbook, untouched):
    refused = playbook("deploy")
    assert refused.returncode != 0 and "-e bundle=PATH" in refused.stdout


def test_a_wrong_checksum(playbook, untouched, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(SOURCE, broken)
    manifest = yaml.safe_load((broken / "manifest.yaml").read_text()) | {"version": "9.9.9"}
    (broken / "manifest.yaml").write_text(yaml.safe_dump(manifest))
    refused = playbook("deploy", "-e", f"bundle={broken}")
    assert refused.returncode != 0 and "checksum" in refused.stdout
