"""The role of the model's image and unit: what it hands to a colour, what it leaves behind, and what it refuses."""

import subprocess
import sys
from pathlib import Path

import jinja2
import pytest
import yaml
from model_server.config import Config, ConfigError

PROJECT = Path(__file__).resolve().parents[2]
ROLE = PROJECT / "roles/model"
ANSIBLE = Path(sys.executable).with_name("ansible-playbook")
DOCKER = """#!/bin/sh
echo "$@" >>{calls}
[ "$1" != {failing} ]
"""


def rendered(name, **settings):
    """One of the role's templates, as Ansible renders it with its defaults."""
    environment = jinja2.Environment(trim_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    environment.filters["bool"] = bool
    defaults = yaml.safe_load((ROLE / "defaults/main.yml").read_text())
    template = environment.from_string((ROLE / "templates" / name).read_text())
    return template.render(**defaults | {"model_account": {}} | settings)


def variables(**settings):
    lines = rendered("model.env.j2", **settings).splitlines()
    return dict(line.split("=", 1) for line in lines if not line.startswith("#"))


def test_a_colour_has_every_setting_of_its_own():
    on, off = variables(model_jobs_enabled=True), variables(model_jobs_enabled=False)
    assert list(on) == list(off)
    assert Config.from_environment(on).jobs.directory == Path("/jobs")
    assert Config.from_environment(off).jobs is None


@pytest.mark.parametrize("failing", ["nothing", "build", "import", "image"])
def test_no_build_leaves_a_password_behind(tmp_path, failing):
    context, calls, docker = tmp_path / "context", tmp_path / "calls", tmp_path / "bin/docker"
    context.mkdir()
    (context / "pip.conf").touch()
    docker.parent.mkdir()
    docker.write_text(DOCKER.format(calls=calls, failing=failing))
    docker.chmod(0o755)
    (docker.parent / "mmdebstrap").symlink_to("/bin/true")
    given = {"CONTEXT": str(context), "BASE_IMAGE": "", "BASE_MIRROR": "http://mirror", "IMAGE": "model"}
    answer = subprocess.run(
        ["bash", "-c", rendered("build-image.j2")], env={"PATH": f"{docker.parent}:/usr/bin:/bin"} | given, check=False
    )
    assert (answer.returncode == 0) == (failing == "nothing")
    assert not context.exists()
    said = calls.read_text().splitlines()
    assert said[-1] == "image prune --force --filter label=appliance.stage=build"
    # What keeps an image from being pruned.
    assert all("--force-rm" in call for call in said if call.startswith("build "))


def preflight(root, role, **settings):
    """The output of Ansible, in one line."""
    defaults = yaml.safe_load((PROJECT / f"roles/{role}/defaults/main.yml").read_text())
    host = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable}
    include = {"ansible.builtin.include_role": {"name": role, "tasks_from": "preflight.yml"}}
    play = {"hosts": "all", "gather_facts": False, "vars": defaults | settings, "tasks": [include]}
    (root / "hosts.yml").write_text(yaml.safe_dump({"all": {"hosts": {"here": host}}}))
    (root / "play.yml").write_text(yaml.safe_dump([play]))
    answer = subprocess.run(
        [ANSIBLE, "-i", root / "hosts.yml", root / "play.yml"],
        env={
            "PATH": f"{ANSIBLE.parent}:/usr/bin:/bin",
            "HOME": str(root),
            "ANSIBLE_CONFIG": str(PROJECT / "ansible.cfg"),
            "LC_ALL": "C.UTF-8",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    return " ".join((answer.stdout + answer.stderr).split())


@pytest.mark.parametrize(
    ("role", "setting"), [("base", "base_extra_ca_files"), ("model", "model_build_extra_ca_files")]
)
def test_authorities_that_would_replace_each_other_are_refused(tmp_path, role, setting):
    said = preflight(tmp_path, role, **{setting: ["/one/proxy.pem", "/two/proxy.crt"]})
    assert f"Files of {setting} would replace each other" in said
    assert "/one/proxy.pem, /two/proxy.crt. Rename one of them." in said
    said = preflight(tmp_path, role, **{setting: ["/one/proxy.pem", "/one/proxy.pem", "/two/Proxy.pem"]})
    assert "replace each other" not in said and "Check that each certificate authority has a name of its own" in said


@pytest.mark.parametrize(("limit", "taken"), [(0, False), (1, True), (10_000, True), (10_001, False)])
def test_the_role_takes_the_limit_of_jobs_that_the_service_takes(tmp_path, limit, taken):
    refused = f"model_jobs_limit is {limit}; it must be a whole number from 1 to 10000."
    assert (refused not in preflight(tmp_path, "model", model_jobs_limit=limit)) == taken
    try:
        Config.from_environment(variables(model_jobs_limit=limit))
        assert taken
    except ConfigError:
        assert not taken
