"""Releases (immutable records) and env files (which release a colour holds)."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any, NamedTuple

from rollout import files
from rollout.errors import Failed
from rollout.text import now

IMAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/:@-]{0,254}")
_NUMBER = re.compile(r"[1-9][0-9]*")
# What became of a release's load test. Only the first lets it go live while the gate is enabled.
GATE_PASSED, GATE_FAILED, GATE_SKIPPED, GATE_DISABLED = "passed", "failed", "skipped", "disabled"


class Release(NamedTuple):
    """A bundle, an image and settings, made for a colour at a time by somebody."""

    colour: str
    name: str
    version: str
    bundle: str
    bundle_digest: str
    image: str
    image_id: str
    who: str
    when: str
    reason: str | None = None
    number: int = 0
    settings_digest: str | None = None
    """`sha256:` and the SHA-256 of its settings; None where there were none, or the record is older than this field."""
    origin: str | None = None
    """Where the bundle was delivered from."""
    revision: str | None = None
    """The revision of the sources there."""


class Releases:
    """`releases/` and the colours' env files. Changing methods are for the holder of the lock."""

    def __init__(self, directory: Path, config_dir: Path) -> None:
        self.directory = directory
        self.config_dir = config_dir

    def create(self, release: Release) -> Release:
        """Record a release under the next number, durably, and return it with that number. Raises OSError."""
        files.ensure_directory(self.directory)
        for path in self.directory.glob(".*"):
            files.remove_tree(path)
        release = release._replace(number=self.next_number())
        temporary = self.directory / f".new-{release.number}"
        try:
            files.make_directory(temporary)
            content = json.dumps(release._asdict(), indent=1).encode() + b"\n"
            files.write_new(temporary / "release.json", content, 0o444)
            files.fsync_directory(temporary)
            os.rename(temporary, self.directory / str(release.number))
        except OSError:
            files.remove_tree(temporary)
            raise
        files.fsync_directory(self.directory)
        return release

    def add_checks(self, number: int, stage: str, checks: list[dict[str, Any]]) -> None:
        """Add what was found out about a release to `checks.json` beside its record. Raises OSError."""
        path = self.directory / str(number) / "checks.json"
        try:
            entries = json.loads(path.read_bytes())["checks"]
        except (OSError, ValueError, KeyError, TypeError):
            entries = []
        entries.append({"when": now(), "stage": stage, "checks": checks})
        files.replace(path, json.dumps({"checks": entries}, indent=1).encode() + b"\n")

    def set_gate(self, number: int, verdict: str, who: str, reasons: list[str] | None = None) -> None:
        """Record durably in `gate.json`, beside the record, what became of a release's gate. Raises OSError."""
        about = {"verdict": verdict, "who": who, "when": now(), "reasons": reasons or []}
        files.replace(self.directory / str(number) / "gate.json", json.dumps(about, indent=1).encode() + b"\n")

    def gate(self, number: int) -> str | None:
        """The verdict of `set_gate`; None where there is none that can be read, so that nothing is known."""
        try:
            return json.loads((self.directory / str(number) / "gate.json").read_bytes())["verdict"]
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def next_number(self) -> int:
        """The number that the next release gets. A number is never used twice while its record is kept."""
        try:
            return max((int(n) for n in os.listdir(self.directory) if _NUMBER.fullmatch(n)), default=0) + 1
        except FileNotFoundError:
            return 1

    def get(self, number: int) -> Release:
        """The record of release `number`. Raises Failed where it is missing or can't be used."""
        path = self.directory / str(number) / "release.json"
        try:
            raw = {"settings_digest": None, "origin": None, "revision": None, **json.loads(path.read_bytes())}
            return Release(**{key: raw[key] for key in Release._fields})
        except OSError as error:
            raise Failed(
                f"release {number} has no record: {path}: {error.strerror}; 'appliance history' has the numbers that "
                f"were given, and the bundle of one that is gone must be deployed again"
            ) from None
        except (ValueError, KeyError, TypeError) as error:
            raise Failed(f"{path} can't be used: {type(error).__name__}: {error}; deploy again") from None

    @property
    def settings_path(self) -> Path:
        """The settings for the next release of either colour."""
        return self.config_dir / "model.env"

    def settings(self) -> bytes | None:
        """The settings as they are, or None where there are none. Raises OSError."""
        try:
            return self.settings_path.read_bytes()
        except FileNotFoundError:
            return None

    def env_path(self, colour: str) -> Path:
        """The env file that the colour's unit reads."""
        return self.config_dir / f"{colour}.env"

    def env(self, colour: str) -> bytes | None:
        """The env file as it is, or None where the colour has never been deployed."""
        try:
            return self.env_path(colour).read_bytes()
        except FileNotFoundError:
            return None

    def placed(self, colour: str) -> int | None:
        """The number of the release that the colour holds; None where it has never been deployed. Raises Failed."""
        content = self.env(colour)
        if content is None:
            return None
        for line in content.decode(errors="replace").splitlines():
            key, _, value = line.partition("=")
            if key.strip() == "MODEL_RELEASE" and _NUMBER.fullmatch(value.strip()):
                return int(value)
        raise Failed(f"{self.env_path(colour)} names no MODEL_RELEASE: deploy to {colour} again")

    def place(self, colour: str, release: Release, settings: bytes | None) -> None:
        """Write the colour's env file in one step. Raises OSError; then the file is as it was."""
        # The id, not the name: a tag can move to another image before the unit's next start.
        content = f"MODEL_IMAGE={release.image_id}\nMODEL_BUNDLE={release.bundle}\nMODEL_RELEASE={release.number}\n"
        # A copy of the settings: what changes in them later mustn't reach a colour that it wasn't tried on.
        files.replace(self.env_path(colour), content.encode() + (settings or b""))

    def put_back(self, colour: str, content: bytes | None) -> None:
        """Restore an env file that `env` returned. Raises OSError."""
        if content is None:
            files.remove(self.env_path(colour))
        else:
            files.replace(self.env_path(colour), content)


def settings_digest(settings: bytes | None) -> str | None:
    """`sha256:` and the SHA-256 of settings, or None where there are none."""
    import hashlib

    return None if settings is None else "sha256:" + hashlib.sha256(settings).hexdigest()
