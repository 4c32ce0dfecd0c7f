"""Programs that the unit tests run as a host does: taken out of the distribution's packages, not installed."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from lab import engine
from lab.console import run, say, step
from lab.controller import PROJECT

ROOT = PROJECT / ".cache/programs"
# What a program comes in.
PACKAGES = {
    "amtool": ["prometheus-alertmanager"],
    "mtail": ["mtail"],
    "nginx": ["nginx", "nginx-common"],
    "promtool": ["prometheus"],
}
# Where Debian keeps them; /usr/sbin isn't on everybody's path.
PLACES = ("usr/bin", "usr/sbin")


def search_path() -> str:
    """`PATH` with the places where a program may be that isn't installed, at its end."""
    return os.pathsep.join([os.environ["PATH"], "/usr/sbin", *(str(ROOT / place) for place in PLACES)])


def ensure() -> None:
    """Unpack those programs that this machine doesn't have. Root isn't needed unless apt has no package lists.

    On a machine without apt the tests that need them are left out, which this says.

    :raises LabError: when apt can't bring them.
    """
    wanted = [name for name in PACKAGES if not shutil.which(name, path=search_path())]
    if not wanted:
        return
    if not (shutil.which("apt-get") and shutil.which("dpkg-deb")):
        say(f"==> This machine has no apt, so tests that need {', '.join(wanted)} are left out.")
        return
    with step(f"Unpacking {', '.join(wanted)} for the tests"), tempfile.TemporaryDirectory() as directory:
        engine.apt_download(Path(directory), *(package for name in wanted for package in PACKAGES[name]))
        ROOT.mkdir(parents=True, exist_ok=True)
        for archive in sorted(Path(directory).glob("*.deb")):
            run(["dpkg-deb", "--extract", archive, ROOT])
