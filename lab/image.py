"""The lab's host image for one Debian release, built once and found again by a hash of its sources."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from lab import controller, engine
from lab.console import LabError, run, step, succeeds

SOURCES = Path(__file__).parent / "image"
SUITES = {"bookworm": "Debian 12", "trixie": "Debian 13"}
PACKAGES = [
    *("ca-certificates", "dbus", "iproute2", "libpam-systemd", "openssh-server", "procps"),
    *("python3", "python3-apt", "sudo", "systemd", "systemd-sysv"),
]


def tag(suite: str) -> str:
    """Name of the image for a Debian release; it changes whenever the image's sources do."""
    digest = hashlib.sha256(" ".join(PACKAGES).encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + path.read_bytes())
    return f"appliance-lab:{suite}-{digest.hexdigest()[:12]}"


def ensure(suite: str, mirror: str) -> str:
    """Build the image if it isn't there yet and return its name.

    The base is pulled where a registry can be reached, and else bootstrapped from the distribution's packages.

    :param suite: `bookworm` or `trixie`.
    :param mirror: Debian mirror, used when bootstrapping.
    """
    if suite not in SUITES:
        raise LabError(f"The lab knows no Debian release '{suite}'; choose one of: {', '.join(SUITES)}.")
    name = tag(suite)
    if succeeds(["docker", "image", "inspect", name]):
        return name
    with step(f"Building the lab's image ({SUITES[suite]})"):
        base = f"debian:{suite}-slim"
        if not succeeds(["docker", "image", "inspect", base]) and not succeeds(["docker", "pull", "--quiet", base]):
            base = _bootstrap(suite, mirror)
        run(
            ["docker", "build", "--quiet", "--build-arg", f"BASE_IMAGE={base}"]
            + ["--build-arg", f"PACKAGES={' '.join(PACKAGES)}", "--tag", name]
            + ["--label", f"{engine.OWNER}={controller.PROJECT}", SOURCES]
        )
    return name


def remove_all() -> None:
    """Remove every image that this checkout built; another one's labs may stand on the others."""
    ours = ["--filter", f"label={engine.OWNER}={controller.PROJECT}", "--format", "{{.Repository}}:{{.Tag}}"]
    for repository in ("appliance-lab", "appliance-lab-base"):
        names = run(["docker", "image", "ls", *ours, repository]).split()
        for name in names:
            succeeds(["docker", "image", "rm", name])


def _bootstrap(suite: str, mirror: str) -> str:
    name = f"appliance-lab-base:{suite}"
    if succeeds(["docker", "image", "inspect", name]):
        return name
    if not shutil.which("mmdebstrap"):
        engine.apt_install("mmdebstrap", "debian-archive-keyring")
    sources = [
        f"deb {mirror} {suite} main",
        f"deb {mirror} {suite}-updates main",
        f"deb {mirror.rstrip('/')}-security {suite}-security main",
    ]
    command = ["mmdebstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", suite, "-", *sources]
    with tempfile.TemporaryFile() as log:
        # /tmp may be mounted noexec, where the maintainer scripts of the new tree could not run.
        environment = {**os.environ, "TMPDIR": "/var/tmp"}  # noqa: S108
        archive = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, env=environment)
        label = f'--change=LABEL {engine.OWNER}="{controller.PROJECT}"'
        load = ["docker", "import", label, "-", name]
        loaded = subprocess.Popen(load, stdin=archive.stdout, stdout=log, stderr=log)
        # The engine's end alone must hold the pipe: else, where that dies, the bootstrap waits for a reader for ever.
        archive.stdout.close()
        statuses = loaded.wait(), archive.wait()
        if any(statuses):
            succeeds(["docker", "image", "rm", name])
            log.seek(0)
            last = "\n".join(log.read().decode(errors="replace").splitlines()[-10:])
            raise LabError(f"No registry has debian:{suite}-slim, and bootstrapping it from {mirror} failed:\n{last}")
    return name
