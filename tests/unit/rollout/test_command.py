"""The command as it is installed: what it takes from its caller, and what it loads."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rollout import cli

ROOT = Path(__file__).resolve().parents[3]
# Each costs a rollback more time than a switch takes.
HEAVY = ("asyncio", "dataclasses", "datetime", "email", "http", "inspect", "logging", "random", "ssl", "subprocess")
LATE = ("accesslog", "compare", "drain", "follow", "gate", "judge", "prune", "replay", "shadow", "watch")


@pytest.fixture
def installed(tmp_path):
    """The command as the role makes it, but of these sources and for this interpreter."""
    text = (ROOT / "roles/rollout/templates/appliance.j2").read_text()
    text = text.replace("#!/usr/bin/python3 ", f"#!{sys.executable} ").replace(
        "/usr/lib/appliance", str(ROOT / "service")
    )
    command = tmp_path / "appliance"
    command.write_text("".join(line for line in text.splitlines(True) if "ansible_managed" not in line))
    command.chmod(0o755)
    return command


def test_nothing_of_the_caller_becomes_part_of_it(box, installed, tmp_path):
    box.live_on_blue()
    trap = tmp_path / "trap"
    trap.mkdir()
    for name in ("json", "rollout", "sitecustomize", "usercustomize"):
        (trap / f"{name}.py").write_text("raise SystemExit('taken in')\n")
        installed.with_name(f"{name}.py").write_text("raise SystemExit('taken in')\n")
    answer = subprocess.run(
        [installed, "status", "--config", box.config, "--json"],
        env={**os.environ, "PYTHONPATH": str(trap), "PYTHONHOME": str(trap), "PYTHONSTARTUP": str(trap / "json.py")},
        cwd=trap,
        capture_output=True,
        text=True,
    )
    assert (answer.returncode, answer.stderr) == (0, "")
    assert json.loads(answer.stdout)["live"] == "blue"


def test_a_rollback_of_the_command(box, installed):
    box.live_on_blue()
    box.run("swap")
    for _ in range(2):
        command = [installed, "rollback", "--config", box.config]
        answer = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        assert answer.returncode == 0 and answer.stdout.startswith("rolled back: "), answer
    assert [entry["outcome"] for entry in box.audit()[-2:]] == ["done", "done"]
    missing = subprocess.run([installed, "rollback", "--config", "/none"], capture_output=True, text=True)
    assert missing.returncode == 2 and missing.stderr.startswith("appliance: /none: no such file")


@pytest.mark.parametrize("json_output", [[], ["--json"]])
def test_an_answer_that_cant_be_written_is_no_success(box, installed, json_output):
    box.live_on_blue()

    def run(*command):
        with open("/dev/full", "w") as full:
            return subprocess.run(
                [installed, *command, "--config", box.config, *json_output],
                stdout=full,
                stderr=subprocess.PIPE,
                text=True,
            )

    for command in (["status"], ["history"], ["swap", "--dry-run"]):
        answer = run(*command)
        assert answer.returncode == 1 and "can't be written" in answer.stderr, command
    # What was done was done.
    answer = run("swap")
    assert answer.returncode == 0 and box.state.live == "green"
    box.host.stop("green")
    assert run("status").returncode == 3


def test_a_rollback_loads_only_what_it_needs(box):
    box.live_on_blue()
    box.run("swap")
    program = """
import sys
from rollout import cli
status = cli.main(["rollback", "--json", "--config", sys.argv[1]])
print(*sys.modules)
sys.exit(status)
"""
    answer = subprocess.run(
        [sys.executable, "-S", "-c", program, box.config],
        env={**os.environ, "PYTHONPATH": str(ROOT / "service")},
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stderr
    loaded = set(answer.stdout.splitlines()[-1].split())
    assert not loaded & {*HEAVY, *(f"rollout.{name}" for name in LATE)}
    assert "rollout.rollouts" in loaded


def _commands(parser):
    [found] = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    return found.choices


def test_one_command_on_its_own_is_as_among_all():
    everything = cli.build_parser()
    commands = _commands(everything)
    assert list(commands) == list(cli._COMMANDS)
    for name, command in commands.items():
        alone = cli.build_parser(name)
        assert list(_commands(alone)) == [name]
        assert _commands(alone)[name].format_help() == command.format_help()
        assert alone.format_usage() == everything.format_usage()


def test_wrong_usage_is_told_alike(capsys):
    def told(*arguments):
        with pytest.raises(SystemExit) as end:
            cli.main(arguments)
        return end.value.code, capsys.readouterr()

    assert told("rollback", "--bogus") == told("--who", "x", "rollback", "--bogus")
    assert told("rollback", "swap")[0] == 2
    said = told("swop")[1].err
    assert "invalid choice: 'swop'" in said and "'deploy'" in said
