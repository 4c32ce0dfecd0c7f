"""One lab machine: create, boot, reach over SSH as one reaches an EC2 host, remove."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

from lab import controller, image
from lab.console import LabError, run, step, succeeds, wait_until

STATE = controller.PROJECT / ".lab"
# What systemd and a nested Docker need. Not --privileged: that fails where the machine itself lacks a capability.
CAPABILITIES = [
    *("SYS_ADMIN", "NET_ADMIN", "SYS_PTRACE", "SYS_NICE", "DAC_READ_SEARCH"),
    *("IPC_LOCK", "LINUX_IMMUTABLE", "SYS_BOOT", "SYSLOG"),
]
USER = "admin"
# Relative to the machine's directory: the absolute path of a deep checkout would exceed a socket's 107 bytes.
TUNNEL_SOCKET = "tunnel"
GRAFANA_REPOSITORY = "https://apt.grafana.com"


@dataclass(frozen=True)
class Machine:
    """A lab machine's name and the ports on 127.0.0.1 that lead to it; 0 lets the engine choose a free one."""

    name: str
    suite: str = "trixie"
    mirror: str = "http://deb.debian.org/debian"
    ssh_port: int = 0
    edge_port: int = 0
    prometheus_port: int = 0
    grafana_repository: str = GRAFANA_REPOSITORY

    @property
    def container(self) -> str:
        """Name of the container, the volume and the network."""
        return f"appliance-lab-{self.name}"

    @property
    def directory(self) -> Path:
        """Where the controller keeps this machine's key and addresses."""
        return STATE / self.name

    @property
    def ssh_config(self) -> Path:
        """Configuration for `ssh -F` that knows the machine as `lab`."""
        return self.directory / "ssh_config"


def load(name: str) -> Machine:
    """The machine that `create` recorded under this name.

    :raises LabError: when there is none.
    """
    try:
        state = json.loads((STATE / name / "lab.json").read_text())
    except FileNotFoundError:
        raise LabError(f"There is no lab named '{name}'. Create it with `make up`.") from None
    return Machine(**{key: state[key] for key in Machine.__dataclass_fields__})


def is_running(machine: Machine) -> bool:
    """Tell whether the machine's container runs."""
    inspect = ["docker", "container", "inspect", "--format", "{{.State.Running}}", machine.container]
    result = subprocess.run(inspect, capture_output=True, text=True, check=False)
    return result.stdout.strip() == "true"


def create(wanted: Machine) -> Machine:
    """Create and boot the machine, or start it again where it exists; return it with its real ports."""
    exists = succeeds(["docker", "container", "inspect", wanted.container])
    if not exists:
        name = image.ensure(wanted.suite, wanted.mirror)
        with step(f"Booting the lab '{wanted.name}' ({image.SUITES[wanted.suite]}, systemd, SSH)"):
            _create_key(wanted.directory)
            _start_container(wanted, name)
            return _finish(wanted)
    if not is_running(wanted):
        with step(f"Starting the lab '{wanted.name}' again"):
            run(["docker", "start", wanted.container])
            return _finish(wanted)
    return _finish(wanted)


def restart(machine: Machine) -> Machine:
    """Reboot the machine and wait until it is up."""
    run(["docker", "restart", "--time", "60", machine.container])
    return _finish(machine)


def destroy(machine: Machine) -> None:
    """Remove the machine's container, volume, network and state; what isn't there is passed over."""
    close_tunnel(machine)
    succeeds(["docker", "rm", "--force", "--volumes", machine.container])
    succeeds(["docker", "volume", "rm", machine.container])
    succeeds(["docker", "network", "rm", machine.container])
    shutil.rmtree(machine.directory, ignore_errors=True)


def ssh(machine: Machine, *command: str) -> list[str]:
    """The command line that runs something on the machine."""
    return ["ssh", "-F", str(machine.ssh_config), "lab", *command]


def open_tunnel(machine: Machine) -> None:
    """Forward the operators' pages, which listen on the host's loopback only, to the controller's loopback."""
    if _control_tunnel(machine, "check"):
        return
    forward = f"127.0.0.1:{machine.prometheus_port}:127.0.0.1:9090"
    options = ["-f", "-N", "-M", "-S", TUNNEL_SOCKET, "-o", "ExitOnForwardFailure=yes", "-o", "ServerAliveInterval=15"]
    command = ["ssh", "-F", str(machine.ssh_config), *options, "-L", forward, "lab"]
    # ssh -f keeps inherited descriptors open: a reader of a pipe would wait for ever.
    null = subprocess.DEVNULL
    result = subprocess.run(command, cwd=machine.directory, stdin=null, stdout=null, stderr=null, check=False)
    if result.returncode != 0:
        raise LabError(
            f"The tunnel to Prometheus could not be opened: is 127.0.0.1:{machine.prometheus_port} taken? "
            "Choose another with LAB_PROMETHEUS_PORT."
        )


def close_tunnel(machine: Machine) -> None:
    """Close the tunnel if it is open."""
    if machine.ssh_config.exists():
        _control_tunnel(machine, "exit")


def _control_tunnel(machine: Machine, command: str) -> bool:
    arguments = ["ssh", "-F", str(machine.ssh_config), "-S", TUNNEL_SOCKET, "-O", command, "lab"]
    return subprocess.run(arguments, cwd=machine.directory, capture_output=True, check=False).returncode == 0


def _create_key(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    key = directory / "id_ed25519"
    if not key.exists():
        if not shutil.which("ssh-keygen"):
            from lab.engine import apt_install  # noqa: PLC0415 - only where it is missing

            apt_install("openssh-client")
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "appliance-lab", "-f", key])


def _start_container(machine: Machine, image_name: str) -> None:
    mtu = controller.default_route_mtu()
    if not succeeds(["docker", "network", "inspect", machine.container]):
        run(["docker", "network", "create", "--opt", f"com.docker.network.driver.mtu={mtu}", machine.container])
    options = [f"--cap-add={capability}" for capability in CAPABILITIES]
    options += ["--security-opt=seccomp=unconfined", "--security-opt=apparmor=unconfined", "--cgroupns=private"]
    options += [
        "--tmpfs=/run:exec",
        "--tmpfs=/run/lock",
        "--tmpfs=/tmp:exec",
        f"--volume={machine.container}:/var/lib/docker",
    ]
    options += [
        "--env=container=docker",
        f"--name={machine.container}",
        "--hostname=lab",
        f"--network={machine.container}",
    ]
    for host_port, port in ((machine.ssh_port, 22), (machine.edge_port, 80)):
        options.append(f"--publish=127.0.0.1:{host_port or ''}:{port}")
    try:
        run(["docker", "run", "--detach", *options, image_name])
    except LabError as error:
        succeeds(["docker", "rm", "--force", "--volumes", machine.container])
        if "port is already allocated" in str(error) or "address already in use" in str(error):
            raise LabError(
                f"A port is taken (SSH {machine.ssh_port}, edge {machine.edge_port}). Choose others with LAB_SSH_PORT "
                f"and LAB_EDGE_PORT, for example: make up LAB_EDGE_PORT=8081\n{error}"
            ) from error
        raise


def _finish(machine: Machine) -> Machine:
    """Wait for systemd, hand the key in, and record how the machine is reached."""
    _wait_for_boot(machine)
    authorise = "install -m 0600 -o admin -g admin /dev/stdin /home/admin/.ssh/authorized_keys"
    public = (machine.directory / "id_ed25519.pub").read_text()
    run(["docker", "exec", "-i", machine.container, "sh", "-c", authorise], input_text=public)
    reached = Machine(
        **{
            **asdict(machine),
            "ssh_port": _published(machine, 22),
            "edge_port": _published(machine, 80),
        }
    )
    _record(reached)
    wait_until(
        lambda: succeeds(ssh(reached, "true")),
        seconds=30,
        failure=f"The lab '{machine.name}' booted, but SSH on 127.0.0.1:{reached.ssh_port} doesn't answer.",
    )
    return reached


def _wait_for_boot(machine: Machine) -> None:
    def booted() -> bool:
        if not is_running(machine):
            log = subprocess.run(["docker", "logs", "--tail", "20", machine.container], capture_output=True, text=True)
            raise LabError(f"The lab '{machine.name}' stopped while booting:\n{log.stdout}{log.stderr}")
        state = subprocess.run(
            ["docker", "exec", machine.container, "systemctl", "is-system-running"],
            capture_output=True,
            text=True,
            check=False,
        ).stdout.strip()
        return state in ("running", "degraded")

    wait_until(booted, seconds=90, failure=f"systemd in the lab '{machine.name}' did not come up within 90 s.")


def _published(machine: Machine, port: int) -> int:
    return int(run(["docker", "port", machine.container, f"{port}/tcp"]).splitlines()[0].rsplit(":", 1)[1])


def _record(machine: Machine) -> None:
    directory = machine.directory
    host_key = run(["docker", "exec", machine.container, "cat", "/etc/ssh/ssh_host_ed25519_key.pub"]).split()[:2]
    known_hosts = directory / "known_hosts"
    known_hosts.write_text(f"[127.0.0.1]:{machine.ssh_port} {' '.join(host_key)}\n")
    machine.ssh_config.write_text(
        f"Host lab\n  HostName 127.0.0.1\n  Port {machine.ssh_port}\n  User {USER}\n"
        f'  IdentityFile "{directory / "id_ed25519"}"\n  IdentitiesOnly yes\n'
        f'  UserKnownHostsFile "{known_hosts}"\n  StrictHostKeyChecking yes\n  LogLevel ERROR\n'
    )
    state = {
        **asdict(machine),
        "ssh_user": USER,
        "directory": str(directory),
        "grafana_unreachable": _why_grafana_is_unreachable(machine),
        **controller.package_sources(),
    }
    temporary = directory / ".lab.json"
    temporary.write_text(json.dumps(state, indent=2) + "\n")
    os.replace(temporary, directory / "lab.json")


def _why_grafana_is_unreachable(machine: Machine) -> str:
    """Ask the machine itself, because it is the one that installs; the empty string means reachable."""
    probe = (
        "import sys, urllib.request as r\n"
        "try: r.urlopen(sys.argv[1] + '/dists/stable/InRelease', timeout=10).read(1)\n"
        "except Exception as error: print(getattr(error, 'reason', error))"
    )
    command = ["docker", "exec", machine.container, "python3", "-c", probe, machine.grafana_repository]
    return run(command).strip()
