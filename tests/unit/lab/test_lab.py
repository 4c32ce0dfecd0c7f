"""The lab's tool: what it hands on of the controller, and what it says where it can't work."""

import argparse
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from lab import controller, engine, image, machine
from lab.__main__ import _lab_name, _parser
from lab.console import LabError, run, wait_until

PROJECT = Path(__file__).resolve().parents[3]


@pytest.fixture
def nothing_works(monkeypatch):
    """A machine on which no command succeeds."""
    monkeypatch.setattr(engine, "succeeds", lambda command: False)


def test_an_ordinary_user_without_docker_is_told_how_to_get_it(monkeypatch, nothing_works):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(engine.shutil, "which", lambda name: None)
    monkeypatch.setattr(engine.Path, "exists", lambda path: False)
    with pytest.raises(LabError, match="apt-get install docker.io"):
        engine.ensure()


def test_an_ordinary_user_without_rights_is_told_how_to_get_them(monkeypatch, nothing_works):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(engine.shutil, "which", lambda name: f"/usr/bin/{name}")
    with pytest.raises(LabError, match="usermod -aG docker"):
        engine.ensure()


def test_an_engine_that_answers_is_used(monkeypatch):
    monkeypatch.setattr(engine, "succeeds", lambda command: command == ["docker", "info"])
    monkeypatch.setattr(engine, "apt_install", lambda *packages: pytest.fail("nothing is to be installed"))
    engine.ensure()


@pytest.mark.parametrize(
    ("content", "program", "stays"), [("{me}", "nobody", False), ("{me}", None, True), ("x", "a", False)]
)
def test_the_record_of_a_killed_daemon_is_removed(tmp_path, content, program, stays):
    record = tmp_path / "daemon.pid"
    record.write_text(content.format(me=os.getpid()))
    engine._forget_dead(record, program or Path("/proc/self/comm").read_text().strip())
    assert record.exists() == stays


def test_the_image_is_named_after_its_sources(monkeypatch, tmp_path):
    for path in image.SOURCES.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    before = image.tag("trixie")
    monkeypatch.setattr(image, "SOURCES", tmp_path)
    assert image.tag("trixie") == before
    (tmp_path / "sudoers").write_text("# changed\n")
    assert image.tag("trixie") != before


def test_an_unknown_release_is_refused():
    with pytest.raises(LabError, match="bookworm, trixie"):
        image.ensure("sid", "http://mirror")


def test_what_only_this_machine_can_see_is_not_handed_on(monkeypatch):
    settings = {
        "extra-index-url": "file:///srv/simple https://index.example/simple",
        "find-links": "/srv/wheels https://wheels.example",
    }
    monkeypatch.setattr(controller, "_pip_settings", lambda: settings)
    sources = controller.package_sources()
    assert sources["pip_extra_index_urls"] == ["https://index.example/simple"]
    assert sources["pip_find_links"] == ["/srv/wheels", "https://wheels.example"]


def test_pip_settings_of_the_environment_win(monkeypatch, tmp_path):
    (tmp_path / "pip.conf").write_text("[global]\nindex-url = https://file\nfind-links =\n    a\n    b\n")
    for name in ("EXTRA_INDEX_URL", "FIND_LINKS", "CERT"):
        monkeypatch.delenv(f"PIP_{name}", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "pip.conf"))
    monkeypatch.setenv("PIP_INDEX_URL", "https://environment")
    settings = controller._pip_settings()
    assert (settings["index-url"], settings["find-links"]) == ("https://environment", "a b")


def test_the_cpu_index_of_pytorch_is_the_default(monkeypatch):
    monkeypatch.setattr(controller, "_pip_settings", dict)
    assert controller.package_sources()["pip_extra_index_urls"] == [controller.TORCH_INDEX]


@pytest.mark.parametrize("name", ["..", ".", "/home", "UP", "", "-x"])
def test_a_name_that_would_lead_elsewhere_is_refused(name):
    # The check alone: were it missing, a command would remove what the name leads to.
    with pytest.raises(argparse.ArgumentTypeError, match="lower-case"):
        _lab_name(name)


def test_the_name_is_checked_wherever_it_is_taken():
    for command in ("up", "create", "shell", "restart", "down"):
        with pytest.raises(SystemExit):
            _parser().parse_args([command, "--name=.."])


def test_a_taken_port_is_found_at_once():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(LabError, match="LAB_PROMETHEUS_PORT"):
            machine._require_free(taken.getsockname()[1], "LAB_PROMETHEUS_PORT")


def test_a_missing_lab_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "STATE", tmp_path)
    with pytest.raises(LabError, match="'nobody'.*make up"):
        machine.load("nobody")


def test_a_failing_command_shows_its_last_lines():
    with pytest.raises(LabError, match="(?s)exit status 3.*the reason"):
        run([sys.executable, "-c", "import sys; print('the reason', file=sys.stderr); sys.exit(3)"])


def test_waiting_ends_with_the_given_message():
    with pytest.raises(LabError, match="it never came"):
        wait_until(lambda: False, seconds=0.1, failure="it never came", interval=0.02)


@pytest.mark.parametrize("arguments", [["--help"], ["up", "--help"], ["shell", "--help"]])
def test_help(arguments):
    result = subprocess.run([sys.executable, "-m", "lab", *arguments], cwd=PROJECT, capture_output=True, text=True)
    assert result.returncode == 0
    assert "usage" in result.stdout


def test_the_inventory_without_a_lab_has_no_host():
    environment = {**os.environ, "LAB_NAME": "no-such-lab"}
    result = subprocess.run([PROJECT / "inventory/lab/hosts.py"], capture_output=True, text=True, env=environment)
    assert json.loads(result.stdout) == {"appliance": {"hosts": []}, "_meta": {"hostvars": {}}}
    assert "make up" in result.stderr
