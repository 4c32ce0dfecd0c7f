"""The lab's tool: what it hands on of the controller, and what it says where it can't work."""

import argparse
import json
import os
import re
import shlex
import shutil
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from lab import __main__ as lab_command
from lab import controller, engine, image, machine, programs
from lab.__main__ import _lab_name, _machine_from, _parser, _predict, _request, _summary
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


def test_only_what_this_checkout_built_is_removed(monkeypatch):
    commands = []
    monkeypatch.setattr(image, "succeeds", lambda command: commands.append(command) or command[1] != "image")
    monkeypatch.setattr(image, "run", lambda command: commands.append(command) or "appliance-lab:one\n")
    image.ensure("trixie", "http://mirror")
    build = commands[-1]
    label = build[build.index("--label") + 1]
    assert label.endswith(f"={PROJECT}")
    commands.clear()
    image.remove_all()
    listings = [command for command in commands if command[:3] == ["docker", "image", "ls"]]
    assert [command[command.index("--filter") + 1] for command in listings] == [f"label={label}"] * 2
    assert ["docker", "image", "rm", "appliance-lab:one"] in commands


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


def test_pip_settings_are_looked_for_where_pip_does(monkeypatch, tmp_path):
    for name, text in (("machine", "retries = 7\nindex-url = https://machine"), ("user", "index-url = https://user")):
        (tmp_path / name / "pip").mkdir(parents=True)
        (tmp_path / name / "pip/pip.conf").write_text(f"[global]\n{text}\n")
    monkeypatch.setenv("XDG_CONFIG_DIRS", f"{tmp_path}/none:{tmp_path}/machine")
    monkeypatch.setenv("XDG_CONFIG_HOME", f"{tmp_path}/user")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("CONFIG_FILE", "INDEX_URL"):
        monkeypatch.delenv(f"PIP_{name}", raising=False)
    settings = controller._pip_settings()
    assert (settings["index-url"], settings["retries"]) == ("https://user", "7")


def test_the_cpu_index_of_pytorch_is_the_default(monkeypatch):
    monkeypatch.setattr(controller, "_pip_settings", dict)
    assert controller.package_sources()["pip_extra_index_urls"] == [controller.TORCH_INDEX]


def test_a_mirror_in_the_place_of_pypi_leaves_the_cpu_index_of_pytorch(monkeypatch):
    monkeypatch.setattr(controller, "_pip_settings", lambda: {"index-url": "https://mirror.example/simple"})
    sources = controller.package_sources()
    assert sources["pip_index_url"] == "https://mirror.example/simple"
    assert sources["pip_extra_index_urls"] == [controller.TORCH_INDEX]


@pytest.mark.parametrize("setting", ["extra-index-url", "find-links"])
def test_further_sources_of_the_controller_stand_in_for_the_cpu_index_of_pytorch(monkeypatch, setting):
    monkeypatch.setattr(controller, "_pip_settings", lambda: {setting: "https://own.example"})
    assert controller.TORCH_INDEX not in controller.package_sources()["pip_extra_index_urls"]


def test_the_password_of_an_index_is_not_for_everybody_to_read(monkeypatch, tmp_path):
    indexes = ["https://me:secret@one.example/simple", "https://two.example/simple"]
    package = tmp_path / "lib/python3.11/site-packages"
    for name in ("ansible", "jinja2", "yaml"):
        (package / name).mkdir(parents=True)
    monkeypatch.setattr(controller, "VENV", tmp_path)
    monkeypatch.setattr(controller, "_pip_settings", lambda: {"extra-index-url": " ".join(indexes)})
    monkeypatch.setattr(controller, "succeeds", lambda command: True)
    # What pip makes of it, without an installation.
    settings = ["-c", "import os, sys; print(sys.argv, os.environ.get('PIP_EXTRA_INDEX_URL'))"]
    said = []
    monkeypatch.setattr(
        controller,
        "run",
        lambda command, **more: said.append(run([sys.executable, *settings, *command[1:]], **more)),
    )
    controller.ensure_environment("controller")
    [install] = [line for line in said if "'install'" in line]
    arguments, _, given = install.strip().rpartition("] ")
    assert "secret" not in arguments
    assert given.split() == indexes


def test_every_variable_of_the_makefile_reaches_the_machine(monkeypatch):
    head = (PROJECT / "Makefile").read_text().partition("SHELL")[0]
    variables = set(re.findall(r"LAB_[A-Z_]+(?!=)\b", head))
    values = {name: "2201" if name.endswith("_PORT") else name.lower().replace("_", "-") for name in variables}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    made = _machine_from(_parser().parse_args(["up"]))
    taken = {str(getattr(made, field)) for field in machine.Machine.__dataclass_fields__}
    assert "LAB_DEBIAN_MIRROR" in variables
    assert set(values.values()) <= taken


@pytest.mark.parametrize("name", ["..", ".", "/home", "UP", "", "-x"])
def test_a_name_that_would_lead_elsewhere_is_refused(name):
    # The check alone: were it missing, a command would remove what the name leads to.
    with pytest.raises(argparse.ArgumentTypeError, match="lower-case"):
        _lab_name(name)


def test_the_name_is_checked_wherever_it_is_taken():
    for command in ("up", "create", "shell", "restart", "down"):
        with pytest.raises(SystemExit):
            _parser().parse_args([command, "--name=.."])


@pytest.mark.parametrize("port", ["65536", "-1", "http", ""])
def test_a_port_that_there_isnt_is_refused(monkeypatch, capsys, port):
    with pytest.raises(SystemExit):
        _parser().parse_args(["up", f"--edge-port={port}"])
    assert f"argument --edge-port: '{port}' must be a whole number from 0 to 65535" in capsys.readouterr().err


def test_a_port_of_the_environment_is_checked_too(monkeypatch):
    monkeypatch.setenv("LAB_PROMETHEUS_PORT", "99999")
    with pytest.raises(SystemExit):
        _parser().parse_args(["up"])


@pytest.mark.parametrize(
    ("remote", "ended", "status"),
    [
        pytest.param([], 127, 0, id="a shell"),
        pytest.param([], 255, 255, id="no connection"),
        pytest.param(["false"], 1, 1, id="a command"),
    ],
)
def test_a_shell_that_was_left_is_no_failure(monkeypatch, remote, ended, status):
    monkeypatch.setattr(sys, "argv", ["lab", "shell", *remote])
    monkeypatch.setattr(lab_command, "_running", lambda name: machine.Machine(name=name))
    monkeypatch.setattr(lab_command.subprocess, "call", lambda command: ended)
    assert lab_command.main() == status


def test_ansible_runs_in_a_locale_that_every_machine_has(monkeypatch):
    monkeypatch.setenv("LC_ALL", "xx_XX.UTF-8")
    given = []

    def started(command, *, env, **_):
        given.append(env["LC_ALL"])
        return subprocess.CompletedProcess(command, 0)

    with monkeypatch.context() as patch:
        patch.setattr(lab_command.subprocess, "run", started)
        lab_command.playbook(machine.Machine(name="x"), "status")
    make = ["make", "--silent", "--eval", "locale: ; @echo $$LC_ALL", "locale"]
    given.append(subprocess.run(make, cwd=PROJECT, capture_output=True, text=True, check=True).stdout.strip())
    assert given == ["C.UTF-8", "C.UTF-8"]


def test_a_taken_port_is_found_at_once():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(LabError, match="LAB_PROMETHEUS_PORT"):
            machine._require_free(taken.getsockname()[1], "LAB_PROMETHEUS_PORT")


class FakeEngine:
    """Answers `docker` for one machine's container, volume and network, which are there or not."""

    def __init__(self, owner: Path) -> None:
        self.owner = owner
        self.there = {"container", "volume", "network"}

    def succeeds(self, command: list) -> bool:
        return command[1] in self.there

    def run(self, command: list, **_) -> str:
        if command[1] == "inspect":
            return str(self.owner)
        if "rm" in command:
            self.there.discard("container" if command[1] == "rm" else command[1])
        return ""


@pytest.fixture
def unfinished(monkeypatch, tmp_path):
    """Run `create` for a machine that an earlier run left while it booted; give the fake engine that it found."""

    def create(owner: Path) -> FakeEngine:
        found = FakeEngine(owner)
        monkeypatch.setattr(machine, "STATE", tmp_path)
        for name in ("succeeds", "run"):
            monkeypatch.setattr(machine, name, getattr(found, name))
        monkeypatch.setattr(image, "ensure", lambda suite, mirror: "image")
        monkeypatch.setattr(machine, "_create_key", lambda directory: (directory / "id_ed25519").touch())
        monkeypatch.setattr(machine, "_start_container", lambda lab, name: found.there.add("container"))
        monkeypatch.setattr(machine, "_finish", lambda lab: lab)
        machine.create(machine.Machine(name="half"))
        return found

    return create


def test_a_boot_that_was_interrupted_is_begun_anew(unfinished, tmp_path):
    assert unfinished(PROJECT).there == {"container"}
    assert (tmp_path / "half/id_ed25519").exists()


def test_a_boot_may_wait_for_a_colour_that_is_unwell():
    defaults = yaml.safe_load((PROJECT / "roles/rollout/defaults/main.yml").read_text())
    # As TimeoutStartSec of appliance-verify.service has it; it starts a little after systemd.
    assert defaults["rollout_ready_timeout_seconds"] + 60 + 20 <= machine.BOOT_SECONDS


def test_what_another_checkout_left_unfinished_stays(unfinished):
    with pytest.raises(LabError, match="made from /elsewhere"):
        unfinished(Path("/elsewhere"))


@pytest.mark.parametrize(
    "answer", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n[", b"reset", b"no HTTP\r\n\r\n"]
)
def test_an_answer_that_breaks_off_is_a_readable_error(answer):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65536)
                if answer == b"reset":
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n")
                else:
                    connection.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        lab = machine.Machine(name="x", edge_port=server.getsockname()[1])
        with pytest.raises(LabError, match="(?s)POST http://127.0.0.1:.*make status"):
            _predict(lab, "{}")
        thread.join()


def test_the_live_model_is_asked_what_it_understands(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "STATE", tmp_path)
    lab, asked = machine.Machine(name="x"), []
    lab.directory.mkdir()
    examples = {"examples": [{"request": {"data": [[0.5] * 200]}, "response": {}}]}
    monkeypatch.setattr("lab.__main__.run", lambda command: asked.append(command[-1]) or json.dumps(examples))
    assert json.loads(_request(lab, {"model": "simplemodel", "version": "1.0.0"})) == {"data": [0.2, 0.6]}
    assert not asked
    body = _request(lab, {"model": "digits", "version": "1.0.0"})
    assert json.loads(body) == {"data": [[0.5] * 200]}
    assert asked == ["sudo cat /var/lib/appliance/bundles/digits/1.0.0/examples.json"]
    live = {"model": "digits", "version": "1.0.0", "release": 3, "status": "ready"}
    status = {"live": "blue", "idle": "green", "colours": {"blue": live, "green": live}}
    summary = _summary(lab, status, body, "9" * 5000, {}, "", 1.0)
    assert "its first example -> 999" in summary and len(summary) < 1500
    [tried] = [line for line in summary.splitlines() if "curl" in line]
    named = Path(shlex.split(tried)[-1].removeprefix("@"))
    assert named.read_text() == body and named.samefile(tmp_path / "x" / "request.json")
    body = json.dumps({"text": "it's"})
    [tried] = [line for line in _summary(lab, status, body, "9", {}, "", 1.0).splitlines() if "curl" in line]
    assert shlex.split(tried)[-1] == body


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


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """A machine that has none of the programs, nor a place for them yet."""
    monkeypatch.setattr(programs, "ROOT", tmp_path / "programs")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(programs, "PACKAGES", {"a-program": ["a-package", "another"]})
    return tmp_path


def test_programs_are_unpacked_where_the_tests_look_for_them(monkeypatch, elsewhere):
    def download(directory, *packages):
        assert packages == ("a-package", "another")
        (directory / "it.deb").touch()

    def extract(command):
        assert command[:2] == ["dpkg-deb", "--extract"] and command[2].name == "it.deb"
        place = command[3] / "usr/bin/a-program"
        place.parent.mkdir(parents=True)
        place.touch(mode=0o755)

    monkeypatch.setattr(programs.engine, "apt_download", download)
    monkeypatch.setattr(programs, "run", extract)
    found = shutil.which
    monkeypatch.setattr(
        programs.shutil, "which", lambda name, **more: found(name, **more) if more else f"/usr/bin/{name}"
    )
    programs.ensure()
    assert found("a-program", path=programs.search_path()) == str(elsewhere / "programs/usr/bin/a-program")
    monkeypatch.setattr(programs.engine, "apt_download", lambda *_: pytest.fail("it is there already"))
    programs.ensure()


def test_a_machine_without_apt_is_told_what_is_left_out(elsewhere, capsys):
    programs.ensure()
    assert "no apt, so tests that need a-program are left out" in capsys.readouterr().out
    assert not (elsewhere / "programs").exists()
