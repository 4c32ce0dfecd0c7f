"""The engine's metrics, in a file that node exporter reads: its textfile collector adds them to its own."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rollout import audit, files, plan
from rollout.config import Config
from rollout.errors import Failed
from rollout.releases import Releases
from rollout.routing import Routing, State

_PHASES = (*plan.UNDER_WAY, *plan.OVER)
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
_WAIT_SECONDS = 1.0
_POLL_SECONDS = 0.01
_Samples = Iterable[tuple[dict[str, str], float]]


def write(
    path: Path,
    config: Config,
    routing: Routing,
    releases: Releases,
    rollout: Callable[[], dict[str, Any] | None],
) -> None:
    """Write all metrics in one step; nothing happens where there is no such directory.

    `rollout` gives the last rollout: its `phase`, and its `checks`, each with a `name` and a `verdict`. What can't be
    told is left out. Takes turns with other processes that write, whoever holds the lock. Raises OSError.
    """
    if not path.parent.is_dir():
        return
    # All is read in one's turn: the last to write has seen what the others did.
    with _turn(path.parent):
        state = routing.known()
        families = (
            *_of_routing(config, state, releases),
            *_of_audit(config.audit_file, _stamp(config.audit_file)),
            *_of_rollout(rollout() or {}),
        )
        files.replace(path, "".join(families).encode())


@contextlib.contextmanager
def _turn(directory: Path) -> Iterator[None]:
    """Be the only one who writes there. Raises OSError where somebody else takes too long: a rollback mustn't wait."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        if not files.lock_within(descriptor, _WAIT_SECONDS, _POLL_SECONDS):
            raise OSError(errno.EBUSY, "another process holds it", str(directory))
        yield
    finally:
        os.close(descriptor)


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        about = path.stat()
        return about.st_ino, about.st_size, about.st_mtime_ns
    except FileNotFoundError:
        return None


@functools.lru_cache(maxsize=1)
def _of_audit(path: Path, _stamp: tuple[int, ...] | None) -> tuple[str, ...]:
    # The watch writes every few seconds, and the log is as long as the history of the host.
    return tuple(_of_history(audit.read(path)))


def _of_routing(config: Config, state: State | None, releases: Releases) -> Iterator[str]:
    held = []
    for colour in config.colours:
        try:
            number = releases.placed(colour)
            release = releases.get(number) if number else None
        except Failed:
            continue
        if release:
            role = "live" if state and state.live == colour else "idle"
            labels = {"release": str(release.number), "model": release.name, "version": release.version}
            held.append(({"colour": colour, "role": role, **labels}, 1))
    yield _family("appliance_release_info", "gauge", "What a colour holds; always 1.", held)
    if state:
        yield _gauge("appliance_split_percent", "Users whom the idle colour serves.", state.split)
        yield _gauge("appliance_shadow_percent", "Requests that are copied to the idle colour.", state.shadow)
        yield _gauge("appliance_maintenance", "1 while nobody is served.", state.maintenance)


def _of_history(entries: list[dict[str, Any]]) -> Iterator[str]:
    """What the audit log tells: it only grows, and so do the counters."""
    switches = [entry for entry in entries if audit.has_switched(entry)]
    commands = Counter(str(entry.get("command")).partition(" ")[0] for entry in switches)
    # Always there: without a series from before, the first rollback would be no change.
    reasons = Counter({"by hand": 0})
    for entry in entries:
        if entry.get("cause"):
            reasons[str(entry["cause"])] += 1
        elif entry.get("command") == "rollback" and audit.has_switched(entry):
            reasons["by hand"] += 1
    yield _family(
        "appliance_switches_total",
        "counter",
        "Changes of the live colour, by command.",
        [({"command": command}, count) for command, count in sorted(commands.items())],
    )
    yield _family(
        "appliance_rollbacks_total",
        "counter",
        "Returns to the earlier release, by reason.",
        [({"reason": reason}, count) for reason, count in sorted(reasons.items())],
    )
    if switches:
        moment, seconds = _measured(switches[-1])
        yield _gauge("appliance_last_switch_timestamp_seconds", "When the live colour changed last.", moment)
        yield _gauge("appliance_last_switch_seconds", "From then to the first answer.", seconds)


def _measured(entry: dict[str, Any]) -> tuple[float | None, float | None]:
    """When a switch was, in seconds since the epoch, and how many passed until the first answer; None: not known."""
    moment, durations = entry.get("switched_at"), entry.get("durations") or {}
    if moment is None:
        # Nobody measured it: when it was recorded, which is soon after.
        import datetime

        with contextlib.suppress(KeyError, TypeError, ValueError):
            moment = datetime.datetime.fromisoformat(entry["time"]).timestamp()
    milliseconds = durations.get("switch_ms")
    return moment, None if milliseconds is None else milliseconds / 1000


def _of_rollout(rollout: dict[str, Any]) -> Iterator[str]:
    yield _family(
        "appliance_rollout_phase",
        "gauge",
        "1 for the phase of the last rollout.",
        [({"phase": phase}, phase == rollout.get("phase")) for phase in _PHASES],
    )
    yield _family(
        "appliance_verdict",
        "gauge",
        "1 for the last verdict of each check of the last rollout.",
        [({"check": check["name"], "verdict": check["verdict"]}, 1) for check in rollout.get("checks") or ()],
    )


def _gauge(name: str, text: str, value: float | None) -> str:
    return _family(name, "gauge", text, [] if value is None else [({}, value)])


def _family(name: str, kind: str, text: str, samples: _Samples) -> str:
    """A metric in Prometheus's text format, version 0.0.4; nothing without samples."""
    lines = [f"{name}{_labels(labels)} {float(value)!r}\n" for labels, value in samples]
    return f"# HELP {name} {text}\n# TYPE {name} {kind}\n{''.join(lines)}" if lines else ""


def _labels(labels: dict[str, str]) -> str:
    pairs = [f'{name}="{value.translate(_ESCAPES)}"' for name, value in labels.items()]
    return f"{{{','.join(pairs)}}}" if pairs else ""
