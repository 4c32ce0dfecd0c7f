"""Command line of the lab: `python3 -m lab COMMAND`; the Makefile's targets call it."""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import shlex
import subprocess
import sys
import time
import urllib.error
import urllib.request

from lab import controller, engine, image, machine, programs
from lab.console import LabError, fail, run, say, step

# What the models that the lab begins with take.
EXAMPLE = {"data": [0.2, 0.6]}
MODEL = "simplemodel"
_SHOWN_CHARACTERS = 200


def up(wanted: machine.Machine) -> None:
    """From nothing to a served prediction: engine, environment, machine, site.yml, one request, a summary."""
    start = time.monotonic()
    engine.ensure()
    environment = _start_environment("controller")
    try:
        lab = machine.create(wanted)
    except BaseException:
        environment.terminate()
        raise
    _finish_environment(environment)
    unreachable = _state(lab)["grafana_unreachable"]
    if unreachable:
        _warn_about_grafana(lab, unreachable)
    with step("Provisioning the lab with playbooks/site.yml"):
        playbook(lab, "site")
    with step("Opening the tunnel to Prometheus, and sending a prediction through nginx"):
        machine.open_tunnel(lab)
        status = json.loads(run(machine.ssh(lab, "sudo appliance status --json")).splitlines()[-1])
        body = _request(lab, status["colours"][status["live"]])
        answer, headers = _predict(lab, body)
    say(_summary(lab, status, body, answer, headers, unreachable, time.monotonic() - start))


def playbook(lab: machine.Machine, name: str, *arguments: str) -> None:
    """Run one of the playbooks against the lab, its output passed through.

    :raises LabError: when it fails; its own last lines say why.
    """
    command = [str(controller.VENV / "bin/ansible-playbook"), f"playbooks/{name}.yml", *arguments]
    path = f"{controller.VENV / 'bin'}:{os.environ['PATH']}"
    # Ansible ends at once where the user's own locale was never generated on this machine.
    environment = {**os.environ, "LAB_NAME": lab.name, "PATH": path, "LC_ALL": "C.UTF-8"}
    result = subprocess.run(command, cwd=controller.PROJECT, env=environment, check=False)
    if result.returncode != 0:
        raise LabError(f"playbooks/{name}.yml ended with exit status {result.returncode}; the reason stands above.")


def _running(name: str) -> machine.Machine:
    lab = machine.load(name)
    engine.require()
    if not machine.is_running(lab):
        raise LabError(f"The lab '{name}' is stopped. `make up` starts it again.")
    return lab


def down(name: str) -> None:
    """Remove what `up` made on this machine: the lab, its images, a Docker daemon that it started."""
    lab = machine.Machine(name=name)
    if not lab.directory.exists() and not machine.exists(lab):
        say(f"There is no lab named '{name}': nothing to remove.")
        return
    engine.ensure()
    if machine.exists(lab) and (other := machine.owner(lab)) != controller.PROJECT and other.is_dir():
        raise LabError(f"The lab '{name}' was made from {other}: run `make down LAB_NAME={name}` there.")
    with step(f"Removing the lab '{name}'"):
        machine.destroy(lab)
        if machine.STATE.exists() and not any(machine.STATE.iterdir()):
            machine.STATE.rmdir()
            image.remove_all()
    # Another lab of this checkout may be just about to boot.
    if not machine.STATE.exists():
        engine.stop_if_ours()
    say("Removed. The virtual environment stays in .venv; delete the directory if you don't want it.")


def _start_environment(kind: str) -> subprocess.Popen[bytes]:
    """Install the environment beside the machine's creation: the two wait for different things."""
    return subprocess.Popen([sys.executable, "-m", "lab", "environment", kind], cwd=controller.PROJECT)


def _finish_environment(process: subprocess.Popen[bytes]) -> None:
    if process.wait() != 0:
        raise LabError("The Python environment could not be installed; the reason stands above.")


def _state(lab: machine.Machine) -> dict:
    return json.loads((lab.directory / "lab.json").read_text())


def _request(lab: machine.Machine, live: dict) -> str:
    """A request that the live model understands, as JSON: somebody may have made another one live since."""
    if live["model"] == MODEL:
        return json.dumps(EXAMPLE)
    path = f"/var/lib/appliance/bundles/{live['model']}/{live['version']}/examples.json"
    return json.dumps(json.loads(run(machine.ssh(lab, f"sudo cat {path}")))["examples"][0]["request"])


def _predict(lab: machine.Machine, body: str) -> tuple[str, dict[str, str]]:
    url = f"http://127.0.0.1:{lab.edge_port}/predict"
    request = urllib.request.Request(  # noqa: S310 - loopback only
        url, data=body.encode(), headers={"Content-Type": "application/json"}
    )
    try:
        try:
            with urllib.request.urlopen(request, timeout=10) as response:  # noqa: S310
                return response.read().decode().strip(), dict(response.headers)
        except urllib.error.HTTPError as refused:
            failure = f"{refused} {refused.read().decode(errors='replace')}"
    # Also while an answer is read: not all of that is a URLError.
    except (OSError, http.client.HTTPException) as error:
        failure = repr(error)
    raise LabError(f"POST {url} failed: {failure}\nLook with `make status` and `make shell`.")


def _warn_about_grafana(lab: machine.Machine, reason: str) -> None:
    line = "!" * 100
    say(
        f"{line}\n!!  GRAFANA IS LEFT OUT. The lab can't reach {lab.grafana_repository}: {reason}\n"
        "!!  Everything else is installed. With a mirror: make up LAB_GRAFANA_REPOSITORY=http://mirror/grafana\n" + line
    )


def _summary(
    lab, status: dict, body: str, answer: str, headers: dict[str, str], unreachable: str, seconds: float
) -> str:
    live, idle = status["live"], status["idle"]

    def release(colour: str) -> str:
        entry = status["colours"][colour]
        return f"{entry['model']} {entry['version']}, release {entry['release']}, {entry['status']}"

    edge = f"http://127.0.0.1:{lab.edge_port}"
    grafana = f"http://127.0.0.1:{lab.grafana_port}   user admin; password: sudo cat /etc/grafana/admin_password"
    if unreachable:
        grafana = "left out: its repository can't be reached"
    request = shlex.quote(body)
    if len(body) > _SHOWN_CHARACTERS:
        file = lab.directory / "request.json"
        file.write_text(body)
        body, request = "its first example", shlex.quote(f"@{os.path.relpath(file)}")
    if len(answer) > _SHOWN_CHARACTERS:
        answer = f"{answer[:_SHOWN_CHARACTERS]} …"
    variable = "" if lab.name == "appliance" else f" LAB_NAME={lab.name}"
    return f"""
The appliance is up ({seconds:.0f} s).

  live   {live:6} {release(live)}
  idle   {idle:6} {release(idle)}

  POST {edge}/predict       {body} -> {answer}   (answered by {headers.get("X-Model-Colour")})
  POST {edge}/test/predict  the idle colour
  Prometheus                            http://127.0.0.1:{lab.prometheus_port}
  Grafana                               {grafana}

Try next:
  curl -X POST {edge}/predict -H 'Content-Type: application/json' -d {request}
  make swap{variable}       make the idle colour live, without losing a request
  make rollback{variable}   and back
  make status{variable}     which colour is production?
  make shell{variable}      a shell on the host
  make down{variable}       remove the lab
"""


def _lab_name(text: str) -> str:
    """The name becomes part of paths and of Docker's names."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,40}", text):
        raise argparse.ArgumentTypeError(f"'{text}' must be lower-case letters, digits and dashes, 41 at the most")
    return text


def _port(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text) <= 65535):
        raise argparse.ArgumentTypeError(f"'{text}' must be a whole number from 0 to 65535")
    return int(text)


def _machine_from(arguments: argparse.Namespace) -> machine.Machine:
    return machine.Machine(
        name=arguments.name,
        suite=arguments.suite,
        mirror=arguments.mirror,
        ssh_port=arguments.ssh_port,
        edge_port=arguments.edge_port,
        prometheus_port=arguments.prometheus_port,
        grafana_port=arguments.grafana_port,
        grafana_repository=arguments.grafana_repository,
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python3 -m lab", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text)

    def named(name: str, text: str) -> argparse.ArgumentParser:
        sub = command(name, text)
        default = os.environ.get("LAB_NAME") or "appliance"
        sub.add_argument("--name", type=_lab_name, default=default, help="which lab [LAB_NAME]")
        return sub

    defaults = machine.Machine(name="")
    for name, text in (
        ("up", "create and provision the lab, and send a prediction"),
        ("create", "create and boot a lab machine without provisioning it"),
    ):
        sub = named(name, text)
        ports = (
            {"ssh_port": 2222, "edge_port": 8080, "prometheus_port": 9090, "grafana_port": 3000} if name == "up" else {}
        )
        for field, text_, kind in (
            ("suite", "Debian release: " + ", ".join(image.SUITES), str),
            ("mirror", "Debian mirror for images that no registry brings", str),
            ("grafana_repository", "Grafana's apt repository", str),
            ("ssh_port", "port on 127.0.0.1 for SSH; 0 = any free one", _port),
            ("edge_port", "port on 127.0.0.1 for nginx; 0 = any free one", _port),
            ("prometheus_port", "port on 127.0.0.1 for the tunnel to Prometheus", _port),
            ("grafana_port", "port on 127.0.0.1 for the tunnel to Grafana", _port),
        ):
            variable = "LAB_DEBIAN_MIRROR" if field == "mirror" else f"LAB_{field.upper()}"
            default = os.environ.get(variable) or ports.get(field, getattr(defaults, field))
            sub.add_argument(f"--{field.replace('_', '-')}", type=kind, default=default, help=f"{text_} [{variable}]")
    sub = named("play", "run a playbook against the lab")
    sub.add_argument("playbook", help="its name, for example swap")
    sub.add_argument("arguments", nargs=argparse.REMAINDER, help="passed to ansible-playbook")
    named("shell", "open a shell on the lab machine").add_argument("remote", nargs="*", help="or run this there")
    named("restart", "reboot the lab machine")
    named("down", "remove the lab machine")
    sub = command("image", "build the image of a lab machine, unless it is there")
    sub.add_argument("suite", choices=image.SUITES)
    sub.add_argument(
        "--mirror", default=os.environ.get("LAB_DEBIAN_MIRROR") or defaults.mirror, help="[LAB_DEBIAN_MIRROR]"
    )
    command("environment", "install the pinned Python environment").add_argument("kind", choices=controller.LOCKS)
    command("engine", "make sure that a Docker engine answers")
    command("programs", "unpack the programs that the unit tests run and this machine lacks")
    return parser


def main() -> int:
    """Run one command; return the exit status."""
    arguments = _parser().parse_args()
    try:
        match arguments.command:
            case "up":
                up(_machine_from(arguments))
            case "create":
                engine.ensure()
                machine.create(_machine_from(arguments))
            case "image":
                engine.ensure()
                image.ensure(arguments.suite, arguments.mirror)
            case "play":
                playbook(_running(arguments.name), arguments.playbook, *arguments.arguments)
            case "shell":
                status = subprocess.call(machine.ssh(_running(arguments.name), *arguments.remote))
                # A shell ends with the status of the last command that was typed, which is nothing for make to
                # complain of; 255 is ssh's own.
                return status if arguments.remote or status == 255 else 0
            case "restart":
                machine.restart(machine.load(arguments.name))
            case "down":
                down(arguments.name)
            case "environment":
                controller.ensure_environment(arguments.kind)
            case "engine":
                engine.ensure()
            case "programs":
                programs.ensure()
    except LabError as error:
        return fail(error)
    except KeyboardInterrupt:
        return fail(LabError("interrupted; run the same command again to go on."))
    return 0


if __name__ == "__main__":
    sys.exit(main())
