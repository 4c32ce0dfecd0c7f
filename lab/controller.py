"""What the controller itself needs and has: its virtual environments, and how it reaches package indexes."""

from __future__ import annotations

import configparser
import hashlib
import os
import shutil
import sys
from pathlib import Path
from urllib.parse import urlsplit

from lab import engine
from lab.console import LabError, run, step, succeeds

PROJECT = Path(__file__).resolve().parent.parent
VENV = PROJECT / ".venv"
# Where the CPU builds of PyTorch are; PyPI has only those for CUDA.
TORCH_INDEX = "https://download.pytorch.org/whl/cpu"
LOCKS = {
    "controller": [PROJECT / "requirements/controller.txt"],
    "dev": [
        PROJECT / "requirements/controller.txt",
        PROJECT / "requirements/dev.txt",
        PROJECT / "service/requirements.txt",
    ],
}


def ensure_environment(kind: str) -> None:
    """Bring the virtual environment `.venv` to the hash-locked state of `controller` or `dev`.

    `dev` contains `controller`, so a later request for the smaller one finds it satisfied.
    """
    if sys.version_info < (3, 11):  # noqa: UP036 - the user's own interpreter, before anything is pinned
        raise LabError(f"Python 3.11 or later is needed, this is {sys.version.split()[0]} ({sys.executable}).")
    if _satisfied(kind) or (kind == "controller" and _satisfied("dev")):
        return
    with step(f"Installing the pinned Python environment ({kind}) in .venv"):
        python = VENV / "bin/python"
        # The interpreter that this one stands on: `.venv` itself may be what runs this, and half made.
        base = getattr(sys, "_base_executable", sys.executable)
        if not succeeds([python, "-m", "pip", "--version"]):
            shutil.rmtree(VENV, ignore_errors=True)
            if not succeeds([base, "-c", "import ensurepip"]):
                engine.apt_install("python3-venv")
            run([base, "-m", "venv", VENV])
        # Not as arguments, which everybody on this machine can read: an index's address may hold a password.
        indexes = {"PIP_EXTRA_INDEX_URL": " ".join(_extra_indexes())}
        for lock in LOCKS[kind]:
            # Compiling everything costs more time than the few modules that are used ever will …
            install = [python, "-m", "pip", "install", "--quiet", "--no-compile", "--require-hashes", "-r", lock]
            run([*install, "--disable-pip-version-check"], variables=indexes)
        # … except Ansible's own, which each task would otherwise compile again where bytecode isn't written.
        packages = [next(VENV.glob(f"lib/python3*/site-packages/{name}")) for name in ("ansible", "jinja2", "yaml")]
        run([python, "-m", "compileall", "-q", "-j", "0", *packages])
        for name in LOCKS:
            _stamp(name).unlink(missing_ok=True)
        _stamp(kind).write_text(_digest(kind))


def package_sources() -> dict[str, object]:
    """How this machine reaches package indexes, for handing on to a host that has to reach the same ones.

    Returns `ca_bundle` (path or empty), `pip_index_url`, `pip_extra_index_urls`, `pip_find_links` (URLs, or directories
    on this machine). Indexes on this machine's own disk are left out: a host can't see them.
    """
    settings = _pip_settings()
    index = settings.get("index-url", "")
    candidates = [os.environ.get(name, "") for name in ("PIP_CERT", "SSL_CERT_FILE", "REQUESTS_CA_BUNDLE")]
    bundle = next((path for path in [settings.get("cert", ""), *candidates] if path and Path(path).is_file()), "")
    return {
        "ca_bundle": bundle,
        "pip_index_url": "" if _is_local(index) else index,
        "pip_extra_index_urls": [url for url in _extra_indexes() if not _is_local(url)],
        "pip_find_links": [link.removeprefix("file://") for link in settings.get("find-links", "").split()],
        "mtu": default_route_mtu(),
    }


def default_route_mtu() -> int:
    """Packet size in bytes of the interface that carries the default route; 1500 where that can't be told."""
    try:
        routes = Path("/proc/net/route").read_text().splitlines()[1:]
        interface = next(row.split()[0] for row in routes if row.split()[1] == "00000000")
        return int(Path(f"/sys/class/net/{interface}/mtu").read_text())
    except (OSError, StopIteration, ValueError):
        return 1500


def _extra_indexes() -> list[str]:
    """Further indexes that pip uses here, and PyTorch's where there are none and no wheels either.

    An index in PyPI's place (`index-url`) may be its mirror, and so changes nothing.
    """
    settings = _pip_settings()
    given = settings.get("extra-index-url", "").split()
    return given if given or settings.get("find-links") else [TORCH_INDEX]


def _is_local(url: str) -> bool:
    return urlsplit(url).scheme == "file"


def _pip_settings() -> dict[str, str]:
    """pip's settings of this user: read from its files and variables, because a system's Python may lack pip."""
    machine = os.environ.get("XDG_CONFIG_DIRS") or "/etc/xdg"
    user = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    files = [*(f"{directory}/pip/pip.conf" for directory in machine.split(":")), "/etc/pip.conf"]
    files += ["~/.pip/pip.conf", f"{user}/pip/pip.conf", os.environ.get("PIP_CONFIG_FILE", os.devnull)]
    parser = configparser.RawConfigParser()
    parser.read(os.path.expanduser(file) for file in files)
    settings = {
        key: " ".join(value.split())
        for section in ("global", "install")
        if parser.has_section(section)
        for key, value in parser.items(section)
    }
    for key in ("index-url", "extra-index-url", "find-links", "cert"):
        variable = f"PIP_{key.upper().replace('-', '_')}"
        if os.environ.get(variable):
            settings[key] = os.environ[variable]
    return settings


def _satisfied(kind: str) -> bool:
    try:
        return _stamp(kind).read_text() == _digest(kind) and (VENV / "bin/python").exists()
    except FileNotFoundError:
        return False


def _stamp(kind: str) -> Path:
    return VENV / f".{kind}.sha256"


def _digest(kind: str) -> str:
    return hashlib.sha256(b"".join(lock.read_bytes() for lock in LOCKS[kind])).hexdigest()
