"""The controller's Docker engine: use the one that is there, else install and start the distribution's."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
from pathlib import Path

from lab.console import LabError, run, say, step, succeeds, wait_until

LOG = Path("/var/log/appliance-lab-dockerd.log")
PID = Path("/run/appliance-lab-dockerd.pid")
# Label of what the lab makes in the engine: the checkout that it belongs to.
OWNER = "appliance.lab.checkout"
APT_LOCK = Path("/run/appliance-lab-apt.lock")
APT_OPTIONS = ("-o", "DPkg::Lock::Timeout=600")


def ensure() -> None:
    """Make sure that `docker` reaches an engine.

    :raises LabError: when there is none and this user can't install or start one.
    """
    if succeeds(["docker", "info"]):
        return
    if os.geteuid() != 0:
        raise LabError(_advice_for_ordinary_user())
    if not shutil.which("dockerd"):
        with step("Installing Docker from the distribution"):
            apt_install("docker.io", "iptables", "ca-certificates")
    if not shutil.which("docker"):
        # From Debian 13 on the client is a package of its own.
        with step("Installing the Docker client"):
            apt_install("docker-cli")
    with step("Starting the Docker engine"):
        if Path("/run/systemd/system").is_dir():
            run(["systemctl", "start", "docker"])
        else:
            _start_daemon()
        wait_until(
            lambda: succeeds(["docker", "info"]),
            seconds=60,
            failure=f"The Docker engine did not answer within 60 s. Its log is {LOG} (or `journalctl -u docker`).",
        )


def require() -> None:
    """Check that the engine answers, for commands that have no use for a fresh one.

    :raises LabError: when it doesn't.
    """
    if not succeeds(["docker", "info"]):
        raise LabError("The Docker engine doesn't answer, so the lab can't be reached. `make up` starts both again.")


def stop_if_ours() -> None:
    """Stop a daemon that `ensure` started by hand, unless somebody runs containers in it."""
    if not PID.exists() or os.geteuid() != 0:
        return
    if succeeds(["docker", "info"]) and run(["docker", "ps", "-q"]).strip():
        say("The Docker engine stays up: other containers are running in it.")
        return
    pid = int(PID.read_text())
    try:
        # A recycled process id must not be hit.
        if Path(f"/proc/{pid}/comm").read_text().strip() == "dockerd":
            os.kill(pid, signal.SIGTERM)
            wait_until(
                lambda: not Path(f"/proc/{pid}").exists() or _is_zombie(pid),
                seconds=30,
                failure=f"dockerd (pid {pid}) did not stop.",
            )
    except (FileNotFoundError, ProcessLookupError):
        pass
    PID.unlink(missing_ok=True)


def apt_install(*packages: str) -> None:
    """Install Debian packages.

    :raises LabError: when this user is not root, apt is absent, or the installation fails.
    """
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise LabError(
            f"Please install {' and '.join(packages)} first (as root: apt-get install {' '.join(packages)})."
        )
    _with_package_lists("apt-get", *APT_OPTIONS, "install", "-y", "--no-install-recommends", *packages)


def apt_download(directory: Path, *packages: str) -> None:
    """Put the archives of Debian packages into a directory, without what they depend on. Root isn't needed.

    :raises LabError: when apt can't bring them.
    """
    _with_package_lists("env", f"--chdir={directory}", "apt-get", "--quiet", "download", *packages)


def _with_package_lists(*command: str) -> None:
    with contextlib.ExitStack() as stack:
        if os.geteuid() == 0:
            # One at a time: environments, programs and machines are made side by side, and each may need a package.
            lock = stack.enter_context(APT_LOCK.open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        # The package lists may be absent or stale: one refresh, and only when the first try fails.
        if not succeeds(["env", "DEBIAN_FRONTEND=noninteractive", *command]):
            if os.geteuid() == 0:
                run(["apt-get", *APT_OPTIONS, "update"])
            run(["env", "DEBIAN_FRONTEND=noninteractive", *command])


def _start_daemon() -> None:
    # Left behind by a daemon that was killed: where the number belongs to another process by now, dockerd would take
    # that one for its own.
    _forget_dead(Path("/run/docker.pid"), "dockerd")
    _forget_dead(Path("/run/docker/containerd/containerd.pid"), "containerd")
    with LOG.open("ab") as log:
        process = subprocess.Popen(
            ["dockerd"], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd="/"
        )
    PID.write_text(str(process.pid))


def _forget_dead(record: Path, program: str) -> None:
    """Remove a file with a process id unless that process is the program."""
    try:
        if Path(f"/proc/{int(record.read_text())}/comm").read_text().strip() == program:
            return
    except (FileNotFoundError, ValueError):
        pass
    record.unlink(missing_ok=True)


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except FileNotFoundError:
        return True


def _advice_for_ordinary_user() -> str:
    user = os.environ.get("USER", "you")
    if shutil.which("docker") or Path("/var/run/docker.sock").exists():
        return (
            f"Docker is here, but {user} may not use it. Either run the command as root (sudo make …), or join the\n"
            f"group and log in again:  sudo usermod -aG docker {user}\n"
            "If the daemon isn't running:  sudo systemctl start docker"
        )
    return (
        "No Docker engine was found, and installing one needs root. Either run the command as root (sudo make …),\n"
        f"or install it first:  sudo apt-get install docker.io && sudo usermod -aG docker {user}"
    )
