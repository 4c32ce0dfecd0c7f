"""Releases that can't be served, and two operators at a time: production goes on, and the reason is named."""

import hashlib
import json
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import yaml

PROJECT = Path(__file__).resolve().parents[3]
SOURCE = PROJECT / "bundles/simplemodel/1.1.0"


def bundle(directory, version, change, *, checksums=True):
    """A copy of a good bundle with its own version and one thing broken."""
    shutil.copytree(SOURCE, directory)
    manifest = yaml.safe_load((directory / "manifest.yaml").read_text())
    manifest["version"] = version
    (directory / "manifest.yaml").write_text(yaml.safe_dump(manifest))
    change(directory)
    if checksums:
        write_checksums(directory)
    return directory


def write_checksums(directory):
    files = sorted(path for path in directory.iterdir() if path.name != "SHA256SUMS")
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (directory / "SHA256SUMS").write_text("".join(lines))


def bad_checksum(directory):
    write_checksums(directory)
    with (directory / "weights.pth").open("ab") as file:
        file.write(b"one more byte")


def missing_class(directory):
    manifest = yaml.safe_load((directory / "manifest.yaml").read_text())
    manifest["entry"]["class"] = "NoSuchModel"
    (directory / "manifest.yaml").write_text(yaml.safe_dump(manifest))


def foreign_weights(directory):
    shutil.copy(PROJECT / "bundles/simplemodel/1.0.0/weights.pth", directory / "weights.pth")


def wrong_examples(directory):
    examples = json.loads((directory / "examples.json").read_text())
    examples["examples"][0]["response"]["output"] = 0.123
    (directory / "examples.json").write_text(json.dumps(examples))


BROKEN = {
    "9.0.1": (bad_checksum, False, "weights.pth isn't what SHA256SUMS says"),
    "9.0.2": (missing_class, True, "NoSuchModel"),
    "9.0.3": (foreign_weights, True, "weights"),
    "9.0.4": (wrong_examples, True, "example"),
}


@pytest.mark.parametrize("version", BROKEN)
def test_a_broken_bundle_never_becomes_ready(host, edge, engine, playbook, tmp_path, version):
    change, checksums, word = BROKEN[version]
    broken = bundle(tmp_path / "broken", version, change, checksums=checksums)
    before = engine("status")
    result = playbook("deploy", "-e", f"bundle={broken}")
    assert result.returncode != 0
    assert word in " ".join(result.stdout.split()), result.stdout[-3000:]
    after = engine("status")
    assert after["live"] == before["live"]
    # The idle colour has its earlier release back.
    assert after["colours"][before["idle"]] | {"workers": None} == before["colours"][before["idle"]] | {"workers": None}
    assert edge.predict().headers["x-model-colour"] == before["live"]


def test_the_reason_is_one_line_of_the_journal(host):
    lines = host.check_output("journalctl --no-pager -o cat -u 'model@*' --since '-30 min'").splitlines()
    refused = [json.loads(line) for line in lines if '"bundle_rejected"' in line]
    assert any("NoSuchModel" in line["message"] for line in refused)


def test_a_delivered_bundle_never_changes(playbook, engine, tmp_path):
    changed = bundle(tmp_path / "changed", "1.0.0", lambda directory: None)
    result = playbook(
        "site", "--tags", "releases", "-e", json.dumps({"rollout_releases": {engine("status")["idle"]: str(changed)}})
    )
    assert result.returncode != 0
    assert "new version" in result.stdout


def test_a_pending_change_leaves_the_live_colour_alone(host, playbook, engine, tmp_path):
    before = engine("status")
    started = host.check_output(f"systemctl show -p ActiveEnterTimestamp model@{before['live']}.service")
    good = bundle(tmp_path / "good", "9.1.0", lambda directory: None)
    result = playbook("site", "--tags", "releases", "-e", json.dumps({"rollout_releases": {before["live"]: str(good)}}))
    assert result.returncode == 0, result.stdout[-3000:]
    assert "swap" in result.stdout
    assert engine("status")["colours"][before["live"]]["version"] == before["colours"][before["live"]]["version"]
    assert host.check_output(f"systemctl show -p ActiveEnterTimestamp model@{before['live']}.service") == started


def test_changed_settings_reach_the_idle_colour_only(host, playbook, engine):
    before = engine("status")
    result = playbook("site", "--tags", "releases", "-e", "model_pids_limit=300")
    assert result.returncode == 0, result.stdout[-3000:]
    assert "MODEL_PIDS=300\n" in host.file(f"/etc/appliance/{before['idle']}.env").content_string
    assert "MODEL_PIDS=256\n" in host.file(f"/etc/appliance/{before['live']}.env").content_string
    after = engine("status")
    assert after["colours"][before["idle"]]["release"] != before["colours"][before["idle"]]["release"]
    assert after["colours"][before["live"]]["release"] == before["colours"][before["live"]]["release"]
    assert "swap" in result.stdout
    assert playbook("site", "--tags", "releases").returncode == 0


def test_two_swaps_at_once_do_not_interleave(lab, engine):
    before = engine("status")
    command = ["ssh", "-F", f"{lab['directory']}/ssh_config", "lab", "sudo appliance swap --json"]
    results = []

    def swap():
        results.append(subprocess.run(command, capture_output=True, text=True, check=False).returncode)

    threads = [threading.Thread(target=swap) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # Each either did a whole swap or was refused, because somebody else held the lock.
    assert set(results) <= {0, 4}
    assert 0 in results
    after = engine("status")
    assert after["state"] == before["state"] + results.count(0)
    assert after["live"] == (before["live"] if results.count(0) % 2 == 0 else before["idle"])


def test_a_playbook_says_who_holds_the_lock(host, playbook):
    holder = "flock /run/lock/appliance.lock sleep 15"
    host.check_output(f"systemd-run --quiet --unit=lock-holder {holder}")
    try:
        result = playbook("swap")
        assert result.returncode != 0
        assert "lock" in result.stdout
    finally:
        host.run("systemctl stop lock-holder.service")
