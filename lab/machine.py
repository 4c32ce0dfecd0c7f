"""One lab machine: create, boot, reach over SSH as one reaches an EC2 host, remove."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

from lab import controller, engine, image
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
# Longer than the boot's own check of the live colour may take (appliance-verify.service): a colour that is unwell is
# nothing that systemd is to blame for.
BOOT_SECONDS = 210
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
    grafana_port: int = 0
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
        variable = "" if name == "appliance" else f" LAB_NAME={name}"
        raise LabError(f"There is no lab named '{name}'. Create it with `make up{variable}`.") from None
    return Machine(**{key: state[key] for key in Machine.__dataclass_fields__})


def is_running(machine: Machine) -> bool:
    """Tell whether the machine's container runs."""
    inspect = ["docker", "container", "inspect", "--format", "{{.State.Running}}", machine.container]
    result = subprocess.run(inspect, capture_output=True, text=True, check=False)
    return result.stdout.strip() == "true"


def create(wanted: Machine) -> Machine:
    """Create and boot the machine, or start it again where it exists; return it with its real ports.

    A machine of this checkout whose boot was never finished is made anew: nothing can have been done with it.

    :raises LabError: when a machine of that name is another checkout's, or was made with other settings.
    """
    if exists(wanted) and owner(wanted) == controller.PROJECT and not (wanted.directory / "lab.json").exists():
        with step(f"Removing what an unfinished run left of the lab '{wanted.name}'"):
            destroy(wanted)
    # First, so that `down` finds something to remove however far this gets.
    wanted.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not exists(wanted):
        _require_free(wanted.prometheus_port, "LAB_PROMETHEUS_PORT")
        _require_free(wanted.grafana_port, "LAB_GRAFANA_PORT")
        name = image.ensure(wanted.suite, wanted.mirror)
        with step(f"Booting the lab '{wanted.name}' ({image.SUITES[wanted.suite]}, systemd, SSH)"):
            _create_key(wanted.directory)
            _start_container(wanted, name)
            return _finish(wanted)
    _require_same(wanted)
    if not is_running(wanted):
        with step(f"Starting the lab '{wanted.name}' again"):
            run(["docker", "start", wanted.container])
            return _finish(wanted)
    return _finish(wanted)


def exists(machine: Machine) -> bool:
    """Tell whether the machine's container exists, running or not."""
    return succeeds(["docker", "container", "inspect", machine.container])


def owner(machine: Machine) -> Path:
    """The checkout that an existing machine was made from, which has its key."""
    inspect = ["docker", "inspect", "--format", f'{{{{index .Config.Labels "{engine.OWNER}"}}}}', machine.container]
    return Path(run(inspect).strip() or "/nonexistent")


def restart(machine: Machine) -> Machine:
    """Reboot the machine and wait until it is up."""
    run(["docker", "restart", "--time", "60", machine.container])
    return _finish(machine)


def destroy(machine: Machine) -> None:
    """Remove the machine's container, volume, network and state; what isn't there is passed over.

    :raises LabError: when something is there and can't be removed; the state stays, so that it can be tried again.
    """
    close_tunnel(machine)
    for kind, remove in (
        ("container", ["rm", "--force", "--volumes"]),
        ("volume", ["volume", "rm"]),
        ("network", ["network", "rm"]),
    ):
        if succeeds(["docker", kind, "inspect", machine.container]):
            run(["docker", *remove, machine.container])
    shutil.rmtree(machine.directory, ignore_errors=True)


def ssh(machine: Machine, *command: str) -> list[str]:
    """The command line that runs something on the machine."""
    return ["ssh", "-F", str(machine.ssh_config), "lab", *command]


def open_tunnel(machine: Machine) -> None:
    """Forward the operators' pages, which listen on the host's loopback only, to the controller's loopback."""
    if _control_tunnel(machine, "check"):
        return
    pages = ((machine.prometheus_port, 9090), (machine.grafana_port, 3000))
    forwards = [f"-L127.0.0.1:{here}:127.0.0.1:{there}" for here, there in pages if here]
    options = ["-f", "-N", "-M", "-S", TUNNEL_SOCKET, "-o", "ExitOnForwardFailure=yes", "-o", "ServerAliveInterval=15"]
    command = ["ssh", "-F", str(machine.ssh_config), *options, *forwards, "lab"]
    # ssh -f keeps inherited descriptors open: a reader of a pipe would wait for ever.
    null = subprocess.DEVNULL
    result = subprocess.run(command, cwd=machine.directory, stdin=null, stdout=null, stderr=null, check=False)
    if result.returncode != 0:
        raise LabError(
            f"The tunnel to Prometheus and Grafana could not be opened: is 127.0.0.1:{machine.prometheus_port} or "
            f"127.0.0.1:{machine.grafana_port} taken? Choose others with LAB_PROMETHEUS_PORT and LAB_GRAFANA_PORT."
        )


def close_tunnel(machine: Machine) -> None:
    """Close the tunnel if it is open."""
    if machine.ssh_config.exists():
        _control_tunnel(machine, "exit")


def _control_tunnel(machine: Machine, command: str) -> bool:
    arguments = ["ssh", "-F", str(machine.ssh_config), "-S", TUNNEL_SOCKET, "-O", command, "lab"]
    return subprocess.run(arguments, cwd=machine.directory, capture_output=True, check=False).returncode == 0


def _create_key(directory: Path) -> None:
    key = directory / "id_ed25519"
    if not key.exists():
        if not shutil.which("ssh-keygen"):
            engine.apt_install("openssh-client")
        run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "appliance-lab", "-f", key])


def _require_free(port: int, variable: str) -> None:
    """Find out now rather than after minutes of provisioning."""
    if not port:
        return
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise LabError(
                f"127.0.0.1:{port} can't be used ({error.strerror}). Choose another port with {variable}."
            ) from error


def _require_same(wanted: Machine) -> None:
    """Refuse what an existing machine can't become; a changed port of the tunnel is simply opened anew."""
    made_from = owner(wanted)
    if made_from != controller.PROJECT:
        raise LabError(
            f"A lab named '{wanted.name}' exists already, made from {made_from}. Remove it there with "
            f"`make down LAB_NAME={wanted.name}`, "
            "or choose another name and ports: make up LAB_NAME=second LAB_EDGE_PORT=8081 "
            "LAB_PROMETHEUS_PORT=9091 LAB_GRAFANA_PORT=3001 LAB_SSH_PORT=2223"
        )
    made = load(wanted.name)
    fixed = {"suite": "LAB_SUITE", "ssh_port": "LAB_SSH_PORT", "edge_port": "LAB_EDGE_PORT"}
    for field, variable in fixed.items():
        value = getattr(wanted, field)
        if value not in (0, getattr(made, field)):
            raise LabError(
                f"The lab '{wanted.name}' was made with {variable}={getattr(made, field)}, not {value}. "
                f"`make down LAB_NAME={wanted.name}` first, or give the variable that value again."
            )
    if (made.prometheus_port, made.grafana_port) != (wanted.prometheus_port, wanted.grafana_port):
        close_tunnel(made)


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
        f"--label={engine.OWNER}={controller.PROJECT}",
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

    failure = f"systemd in the lab '{machine.name}' did not come up within {BOOT_SECONDS} s."
    wait_until(booted, seconds=BOOT_SECONDS, failure=failure)


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
        "import ssl, sys, urllib.request as r\n"
        "trust = ssl.create_default_context()\n"
        "extra = sys.stdin.read()\n"
        "if extra: trust.load_verify_locations(cadata=extra)\n"
        "try: r.urlopen(sys.argv[1] + '/dists/stable/InRelease', timeout=10, context=trust).read(1)\n"
        "except Exception as error: print(getattr(error, 'reason', error))"
    )
    bundle = controller.package_sources()["ca_bundle"]
    extra = Path(str(bundle)).read_text() if bundle else ""
    command = ["docker", "exec", "-i", machine.container, "python3", "-c", probe, machine.grafana_repository]
    return run(command, input_text=extra).strip()
