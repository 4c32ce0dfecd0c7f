"""`rollout.json`: the rollout under way, and how the last one ended. It changes under the lock only.

Where a full disk doesn't take the end of one, the file's name tells it: `rollout.json.<phase>` or, with a cause,
`rollout.json.<phase>.<cause>`. The next plan removes such a file.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from rollout import files
from rollout.routing import State

CANARY, BAKE = "canary", "bake"
UNDER_WAY = (CANARY, BAKE)
DONE, ROLLED_BACK, ABORTED, SUPERSEDED = "done", "rolled_back", "aborted", "superseded"
# Live and well, but nothing could be said about what it answers.
UNJUDGED = "unjudged"
OVER = (DONE, UNJUDGED, ROLLED_BACK, ABORTED, SUPERSEDED)


class Plan(NamedTuple):
    """One rollout: from a colour and its release to the other.

    `state` is the routing state that this plan made last, or is about to make after `before`: where the present one is
    neither, somebody switched by hand and the plan is over. `first` is the state from before it all. `mark` begins the
    ids of its own requests. `asked` is an order that `watch` hasn't carried out yet. `boot` is the boot of the host in
    which it was begun, None where an older engine began it. `cause` is a word for why traffic went back, None where it
    didn't. `earlier` says how an earlier rollout of the same release went back. Times are RFC 3339.
    """

    number: int
    source: str
    target: str
    source_release: int | None
    target_release: int
    phase: str
    first: int
    before: int
    state: int
    mark: str
    who: str
    since: str
    steps: tuple[int, ...] = ()
    step: int = 0
    paused: bool = False
    asked: str | None = None
    ended: str | None = None
    reason: str | None = None
    boot: str | None = None
    cause: str | None = None
    earlier: str | None = None

    @property
    def went_back(self) -> bool:
        """Whether traffic was taken from the new colour again."""
        # An older engine recorded no cause.
        return self.phase == ROLLED_BACK or (self.phase == ABORTED and self.cause is not None)

    @property
    def taken_back(self) -> str | None:
        """How traffic was taken from the new colour by this rollout, or by an earlier one since which it got none."""
        if self.went_back:
            return self.describe()
        return None if self.phase in (DONE, UNJUDGED, SUPERSEDED) else self.earlier

    def unswitched(self, state: State) -> bool:
        """Whether the switch to the new colour is on record and hasn't happened: whoever was about to make it died."""
        return self.phase == BAKE and state.live != self.target

    @property
    def under_way(self) -> bool:
        return self.phase in UNDER_WAY

    @property
    def percent(self) -> int:
        """The share of users that the new colour has."""
        if self.phase == CANARY:
            return self.steps[self.step]
        return 100 if self.phase in (BAKE, DONE, UNJUDGED) else 0

    def percent_by(self, state: State | None) -> int:
        """The share of users that the new colour really has, where it is under way and `state` is the routing's."""
        if state is None or not self.under_way:
            return self.percent
        return 100 if state.live == self.target else state.split

    def describe(self, state: State | None = None) -> str:
        """Where it stands, in words; by the routing's `state` where one is given, which a crash may have kept back."""
        percent = self.percent_by(state)
        if self.phase == CANARY:
            paused = ", paused" if self.paused else ""
            return f"canary: {self.target} (release {self.target_release}) serves {percent} % of users{paused}"
        if self.phase == BAKE and percent < 100:
            return (
                f"bake: {self.target} (release {self.target_release}) isn't live yet, and serves {percent} % of users"
            )
        if self.phase == BAKE:
            target = f"{self.target} (release {self.target_release})"
            return f"bake: {target} is live and watched, the way back is {self.source}"
        reason = f": {self.reason}" if self.reason else ""
        return f"{self.phase.replace('_', ' ')}{reason}"


def read(path: Path) -> Plan | None:
    """The plan, or None where there never was one or the file can't be used: then nothing is under way."""
    try:
        return _parse(path)
    except FileNotFoundError:
        closed = _closed(path)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    try:
        name = closed[0].name.removeprefix(f"{path.name}.")
        phase, _, cause = name.partition(".")
        reason = f"{cause}; its end couldn't be written" if cause else "its end couldn't be written"
        return _parse(closed[0])._replace(phase=phase, cause=cause or None, reason=reason, asked=None, paused=False)
    except (OSError, ValueError, TypeError, KeyError, IndexError):
        return None


def _parse(file: Path) -> Plan:
    raw = json.loads(file.read_bytes())
    known = {key: raw[key] for key in Plan._fields if key in raw}
    return Plan(**{**known, "steps": tuple(raw.get("steps", ()))})


def _closed(path: Path) -> list[Path]:
    """The files whose name tells how a plan ended."""
    return [file for phase in OVER for file in path.parent.glob(f"{path.name}.{phase}*")]


def under_way(path: Path, state: State | None) -> Plan | None:
    """The plan, where it isn't over and the present routing state is one of its own."""
    found = read(path)
    mine = found is not None and state is not None and state.number in (found.before, found.state)
    return found if found is not None and found.under_way and mine else None


def write(path: Path, plan: Plan) -> None:
    """Replace the plan durably. Raises OSError."""
    files.replace(path, json.dumps(plan._asdict(), indent=1).encode() + b"\n")
    for closed in _closed(path):
        files.remove(closed)


def close(path: Path, ended: Plan) -> None:
    """Have the file's name tell how a plan ended, which takes no space on the disk. Raises OSError.

    Nothing happens where another plan is on record, or this one is over already.
    """
    present = read(path)
    if present is None or present.number != ended.number or not present.under_way:
        return
    # One of an earlier plan may be left where the power failed as this one was written.
    for closed in _closed(path):
        files.remove(closed)
    os.rename(path, path.with_name(".".join(filter(None, (path.name, ended.phase, ended.cause)))))
    files.fsync_directory(path.parent)


def with_checks(path: Path, report: Path) -> dict[str, Any] | None:
    """The plan with the `checks` of the watch's last look at it; None where there never was one."""
    present = read(path)
    if present is None:
        return None
    try:
        about = json.loads(report.read_bytes())
        checks = about["checks"] if about["rollout"] == present.number else []
    except (OSError, ValueError, KeyError, TypeError):
        checks = []
    return {**present._asdict(), "checks": checks}


def as_details(plan: Plan | None, state: State | None = None) -> dict[str, Any] | None:
    """The plan's entry in JSON answers; by the routing's `state` where one is given."""
    if plan is None:
        return None
    return {**plan._asdict(), "percent": plan.percent_by(state), "text": plan.describe(state)}
