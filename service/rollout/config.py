"""`appliance.json`: where things are and how long the engine waits."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rollout.errors import UsageError

DEFAULT_PATH = Path("/etc/appliance/appliance.json")
COLOUR_NAME = re.compile(r"[a-z][a-z0-9-]{0,30}")


@dataclass(frozen=True)
class Config:
    """The engine's settings; each key of `appliance.json` may be left out."""

    colours: tuple[str, str] = ("blue", "green")
    state_dir: Path = Path("/var/lib/appliance")
    config_dir: Path = Path("/etc/appliance")
    runtime_dir: Path = Path("/run/appliance")
    lock_file: Path = Path("/run/lock/appliance.lock")
    unit: str = "model@{colour}.service"
    front_door: str = "http://127.0.0.1:80"
    ready_timeout_seconds: float = 120.0
    """Time that a restarted colour gets until it is ready."""
    verify_requests: int = 5
    """Requests on fresh connections, and the same number on one held connection, after a switch."""
    request_timeout_seconds: float = 10.0
    """Time that one health request or prediction may take altogether."""

    @property
    def routing_dir(self) -> Path:
        return self.state_dir / "routing"

    @property
    def bundles_dir(self) -> Path:
        return self.state_dir / "bundles"

    @property
    def releases_dir(self) -> Path:
        return self.state_dir / "releases"

    @property
    def audit_file(self) -> Path:
        return self.state_dir / "audit.jsonl"

    def unit_of(self, colour: str) -> str:
        """The systemd unit of a colour."""
        return self.unit.replace("{colour}", colour)

    def other(self, colour: str) -> str:
        """The colour that isn't `colour`."""
        first, second = self.colours
        return second if colour == first else first


def load(path: Path) -> Config:
    """Read and check the configuration.

    Raises UsageError (exit status 2) with the key and the value where something is missing or wrong.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; name the configuration with --config, or provision the host") from None
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise UsageError(f"{path} isn't valid JSON: {error}") from None
    if not isinstance(raw, dict):
        raise UsageError(f"{path} must hold one JSON object, not {type(raw).__name__}")
    known = {field.name for field in fields(Config)}
    unknown = sorted(set(raw) - known)
    if unknown:
        raise UsageError(f"{path}: unknown key {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    return Config(**{key: _convert(path, key, value) for key, value in raw.items()})


def _convert(path: Path, key: str, value: Any) -> Any:
    def wrong(wanted: str) -> UsageError:
        return UsageError(f"{path}: {key} must be {wanted}, not {json.dumps(value)}")

    if key == "colours":
        names = value if isinstance(value, list) else []
        good = len(names) == 2 and all(isinstance(n, str) and COLOUR_NAME.fullmatch(n) for n in names)
        if not good or names[0] == names[1]:
            raise wrong("a list of two different names")
        return tuple(names)
    if key in ("state_dir", "config_dir", "runtime_dir", "lock_file"):
        if not isinstance(value, str) or not value.startswith("/") or any(c.isspace() for c in value):
            raise wrong("an absolute path without white space")
        return Path(value)
    if key in ("ready_timeout_seconds", "request_timeout_seconds"):
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 86400:
            raise wrong("a number of seconds above 0 and at most 86400")
        return float(value)
    if key == "verify_requests":
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 1000:
            raise wrong("a whole number from 1 to 1000")
        return value
    if key == "unit":
        if not isinstance(value, str) or "{colour}" not in value or value.startswith("-"):
            raise wrong("a unit name that contains {colour}")
        return value
    if not isinstance(value, str) or not _is_base_url(value):
        raise wrong("a URL such as http://127.0.0.1:80")
    return value.rstrip("/")


def _is_base_url(value: str) -> bool:
    try:
        parts = urlsplit(value)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        return False
