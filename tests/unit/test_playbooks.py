"""What playbooks take from the command line: nothing that they don't explain."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

PROJECT = Path(__file__).resolve().parents[2]
# It takes settings alone, which its roles explain.
PLAYBOOKS = sorted(path for path in (PROJECT / "playbooks").glob("*.yml") if path.name != "site.yml")
ANSIBLE = Path(sys.executable).with_name("ansible-playbook")


@pytest.mark.parametrize("playbook", PLAYBOOKS, ids=lambda path: path.stem)
def test_a_playbook_explains_the_variables_that_it_takes(playbook):
    text = playbook.read_text()
    [play] = yaml.safe_load(text)
    first = play["tasks"][0]
    assert first["ansible.builtin.import_tasks"] == "tasks/command_line.yml"
    taken = first["vars"]["playbook_variables"]
    if isinstance(taken, str):
        taken = list(play["vars"]["asked"])
    comment = text[: text.index("- name:")]
    assert [name for name in taken if f"{name}=" not in comment] == []
    assert set(re.findall(r"-e ([a-z0-9_]+)=", comment)) <= set(taken)


@pytest.mark.parametrize(
    ("playbook", "given", "said"),
    [
        ("swap", ["too=green"], "Unknown variable(s) too: this playbook knows to, strategy"),
        ("swap", ["to=green", "rollout_bake_seconds=1"], "Unknown variable(s) rollout_bake_seconds: "),
        ("swap", ["to=green"], "The host has no working rollout engine"),
        ("status", [], "The host has no working rollout engine"),
        ("status", ["@variables.yml"], "Unknown variable(s) status_jason_file: "),
        ("deploy", ["bundel=x", "rollout_bake_seconds=1"], "Unknown variable(s) bundel: "),
        ("deploy", ["bundle=nowhere", "rollout_bake_seconds=1", "appliance_workers=1"], "nowhere doesn't exist"),
        ("loadtest", ["user=3"], "Unknown variable(s) user: this playbook knows target, ramp, users"),
        ("loadtest", ["users=0"], "users is 0; it must be a whole number from 1 to 1000"),
        ("loadtest", ["target=blue"], "target must be production or test"),
        ("drill", ["dril=errors"], "Unknown variable(s) dril: this playbook knows drill."),
        ("drill", ["drill=errors", "appliance_drills_allowed=true"], "Unknown variable(s) appliance_drills_allowed: "),
        ("drill", ["drill=errors"], "Drills break what clients use: they are for labs alone."),
    ],
)
def test_a_misspelt_variable_is_refused(tmp_path, playbook, given, said):
    host = {"ansible_connection": "local", "ansible_become": False, "ansible_python_interpreter": sys.executable}
    wiring = {"vars": yaml.safe_load((PROJECT / "inventory/wiring.yml").read_text()) | {"host_cores": 1}}
    (tmp_path / "hosts.yml").write_text(yaml.safe_dump({"appliance": {"hosts": {"here": host}, **wiring}}))
    (tmp_path / "variables.yml").write_text("status_jason_file: x\n")
    answer = subprocess.run(
        [
            ANSIBLE,
            "-i",
            tmp_path / "hosts.yml",
            PROJECT / f"playbooks/{playbook}.yml",
            *(f"-e{text}" for text in given),
        ],
        cwd=tmp_path,
        env={
            "PATH": f"{ANSIBLE.parent}:/usr/bin:/bin",
            "HOME": str(tmp_path),
            "PWD": str(tmp_path),
            "ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg"),
            "LC_ALL": "C.UTF-8",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert answer.returncode == 2, answer.stdout + answer.stderr
    assert said in re.sub(r"\s+", " ", answer.stdout + answer.stderr)
