"""Removing releases, bundles and images that nothing needs any more."""

from __future__ import annotations

import datetime
import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from rollout import audit, bundles, files, host
from rollout.config import Config
from rollout.errors import ApplianceError, Failed, describe_os_error
from rollout.releases import GATE_DISABLED, GATE_PASSED, GATE_SKIPPED, Release, Releases
from rollout.routing import Routing
from rollout.text import tidy

# Where the role `model` puts its images; the base that it may have made for them is in another one.
_REPOSITORY = "appliance/model"
# What a bundle that has just been delivered gets until a release names it.
_NEW_BUNDLE_SECONDS = 3600
# As long as the next delivery waits for one that came to no end: over a slow line, one may take hours.
_INCOMING_SECONDS = 86400
_DOCKER_SECONDS = 120.0
_LET_THROUGH = (GATE_PASSED, GATE_SKIPPED, GATE_DISABLED)
_PROC = Path("/proc")
_NUMBER = re.compile(r"[1-9][0-9]*")


@dataclass(frozen=True)
class Pruned:
    """What was removed: numbers of releases, directories of bundles, names of images; and what couldn't be, and why."""

    releases: list[int] = field(default_factory=list)
    bundles: list[str] = field(default_factory=list)
    images: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """What was removed, in words."""
        kinds = (("release", self.releases), ("bundle", self.bundles), ("image", self.images))
        parts = [f"{len(removed)} {kind}{'s' if len(removed) > 1 else ''}" for kind, removed in kinds if removed]
        return f"removed {', '.join(parts)}" if parts else "nothing to remove"


def prune(
    config: Config, releases: Releases, routing: Routing, keep: int, named: set[int], pruned: Pruned, *, images: bool
) -> None:
    """Remove the releases that aren't in use, in `named`, or among the last `keep`; then what none of the rest names.

    What was removed stands in `pruned`, also where a signal ends it. Without `images` Docker isn't asked.

    Nor do the last `keep` go that were good enough for users, however many failed after them. In use are those that the
    colours hold and the one that a rollback returns to. The newest stays with `keep` 0 too: no number is given twice.
    For the holder of the lock. Raises nothing else that is foreseeable: faults become `problems`.
    """
    try:
        _prune_releases(config, releases, _in_use(config, releases, routing) | named, max(keep, 1), pruned)
        left = [releases.get(number) for number in _numbers(releases)]
        _prune_bundles(config.bundles_dir, left, pruned)
        if images:
            _prune_images(left, pruned)
    except ApplianceError as fault:
        pruned.problems.append(f"no more was removed: {fault.message}")
    except OSError as error:
        pruned.problems.append(f"no more was removed: {describe_os_error(error).message}")


def _in_use(config: Config, releases: Releases, routing: Routing) -> set[int | None]:
    state = routing.read()
    return {releases.placed(colour) for colour in config.colours} | {state.previous_release if state else None}


def _numbers(releases: Releases) -> list[int]:
    """The numbers of all releases, oldest first."""
    return sorted(int(path.name) for path in _directories(releases.directory, _NUMBER))


def _good(config: Config, releases: Releases, numbers: list[int]) -> list[int]:
    """Those that their load test, or who did without it, let through, or that were live: not what failed before."""
    lived = {entry.get("release") for entry in audit.read(config.audit_file) if audit.has_switched(entry)}
    return [number for number in numbers if number in lived or releases.gate(number) in _LET_THROUGH]


def _prune_releases(config: Config, releases: Releases, used: set[int | None], keep: int, pruned: Pruned) -> None:
    _clear(releases.directory.glob(".old-*"), pruned)
    older = _numbers(releases)[:-keep]
    if not older:
        return
    used = used | set(_good(config, releases, _numbers(releases))[-keep:])
    for number in older:
        if number not in used and _remove(releases.directory / str(number), pruned):
            pruned.releases.append(number)


def _prune_bundles(root: Path, left: list[Release], pruned: Pruned) -> None:
    used = {os.path.realpath(release.bundle) for release in left}
    for model in _directories(root, bundles.NAME):
        _clear(model.glob(".old-*"), pruned)
        # A bundle that was found damaged and delivered again: a container that runs may have it mounted still.
        _clear((path for path in model.glob(".damaged-*") if not _mounted(path)), pruned)
        _clear((path for path in model.glob(".incoming-*") if _age(path) > _INCOMING_SECONDS), pruned)
        for bundle in _directories(model, bundles.VERSION):
            if os.path.realpath(bundle) in used or _age(bundle) < _NEW_BUNDLE_SECONDS:
                continue
            if _remove(bundle, pruned):
                pruned.bundles.append(str(bundle))


def _prune_images(left: list[Release], pruned: Pruned) -> None:
    row = "{{.ID}} {{.Repository}}:{{.Tag}} {{.CreatedAt}}"
    rows = _docker("image", "ls", "--no-trunc", "--filter", f"reference={_REPOSITORY}:*", "--format", row)
    images = [line.split(" ", 2) for line in rows]
    used = {release.image_id for release in left}
    # The newest may have been built for a release that is still to come.
    used |= {identity for identity, _, _ in sorted(images, key=lambda image: _created(image[2]))[-1:]}
    for identity, name, _ in images:
        if identity in used or _docker("ps", "--all", "--quiet", "--filter", f"ancestor={identity}"):
            continue
        try:
            # By name: an image to which somebody gave another one stays under that.
            _docker("image", "rm", name)
        except Failed as fault:
            pruned.problems.append(fault.message)
        else:
            pruned.images.append(name)


def _docker(*arguments: str) -> list[str]:
    """The lines that docker answers. Raises Failed."""
    answer = host.run(["docker", *arguments], _DOCKER_SECONDS)
    if answer.returncode != 0:
        raise Failed(f"'docker {' '.join(arguments)}' failed: {tidy(answer.stderr)}")
    return answer.stdout.splitlines()


def _created(text: str) -> datetime.datetime:
    """The time of an image, which docker writes as `2026-01-31 12:00:00 +0000 UTC`. Raises Failed."""
    try:
        return datetime.datetime.strptime(text[:25], "%Y-%m-%d %H:%M:%S %z")
    except ValueError:
        raise Failed(f"docker gives {tidy(text, 60)!r} as the time of an image, which isn't understood") from None


def _directories(parent: Path, names: re.Pattern[str]) -> list[Path]:
    """The real directories in a directory that have such names; none where it doesn't exist."""
    if not parent.is_dir():
        return []
    found = [path for path in sorted(parent.iterdir()) if names.fullmatch(path.name)]
    return [path for path in found if path.is_dir() and not path.is_symlink()]


def _mounted(directory: Path) -> bool:
    """Whether a process, such as a container's, has a directory mounted, by whatever name it got it."""
    # The kernel tells a mount's source by its present name, from the root of its file system on.
    name = f"/{directory.parent.name}/{directory.name}"
    for table in _PROC.glob("[0-9]*/mountinfo"):
        try:
            lines = table.read_text(errors="replace").splitlines()
        except OSError:
            # It has just ended.
            continue
        if any(line.split(" ", 4)[3].endswith(name) for line in lines):
            return True
    return False


def _age(path: Path) -> float:
    """Seconds since a directory got its name or its last entry; 0 where it has just got another name."""
    try:
        # Not st_mtime: a copy may have that of its original.
        return time.time() - path.lstat().st_ctime
    except FileNotFoundError:
        return 0.0


def _remove(directory: Path, pruned: Pruned) -> bool:
    """Remove a directory, its name first and durably, so that nothing half removed is ever taken for whole."""
    rubbish = directory.parent / f".old-{directory.name}"
    try:
        os.rename(directory, rubbish)
        files.fsync_directory(directory.parent)
    except OSError as error:
        pruned.problems.append(describe_os_error(error).message)
        return False
    _clear([rubbish], pruned)
    return True


def _clear(paths: Iterable[Path], pruned: Pruned) -> None:
    """Remove what bears a dot-name."""
    for path in list(paths):
        files.remove_tree(path)
        if os.path.lexists(path):
            pruned.problems.append(f"{path} can't be removed whole: remove it by hand")
