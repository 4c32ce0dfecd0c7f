"""What is known of one topic by one reference, and the file that keeps it.

The statistics and the offsets of the next messages are one file, replaced in one step: after a crash or a power cut
at any instant, both are of the same moment, and each message counts once.
"""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from drift.errors import DriftError
from drift.reference import Reference
from drift.rows import MISSING, OK, STATUSES, parse
from drift.statistics import FeatureStatistics

_FORMAT = 1


@dataclass
class State:
    """Statistics of a topic's rows up to `offsets`, the next offset of each partition.

    `rows` counts messages by their status. `expired` counts those that Kafka had removed before they were read.
    `last_expired`, when that was last noticed, and `last_message`, the latest timestamp of a message, are in seconds
    since the epoch. `cluster` is Kafka's own id.
    """

    features: list[FeatureStatistics]
    rows: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STATUSES, 0))
    offsets: dict[int, int] = field(default_factory=dict)
    expired: int = 0
    last_expired: float | None = None
    last_message: float | None = None
    cluster: str | None = None

    @classmethod
    def new(cls, reference: Reference) -> State:
        """Nothing read yet."""
        return cls([FeatureStatistics(bins=[0] * len(feature.ratios)) for feature in reference.features])

    def add(self, messages: list[bytes | None], reference: Reference) -> None:
        """Take in the values of messages."""
        names = [feature.name for feature in reference.features]
        usable = []
        for message in messages:
            status, values = parse(message, names)
            self.rows[status] += 1
            if status in (OK, MISSING):
                usable.append(values)
        if not usable:
            return
        columns = zip(*usable, strict=True)
        for statistics, feature, column in zip(self.features, reference.features, columns, strict=True):
            statistics.add([value for value in column if not math.isnan(value)], feature.edges)

    def copy(self) -> State:
        """A copy that later messages don't change."""
        return copy.deepcopy(self)


def load(path: Path, reference: Reference) -> State | None:
    """The state in `path`; None where there is no such file. Raises DriftError where it can't be used."""
    try:
        raw = json.loads(path.read_bytes())
        if raw["format"] != _FORMAT or raw["reference"] != reference.digest:
            raise ValueError(f"format {raw['format']}, reference {raw['reference']}")
        state = _state(raw)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DriftError(f"{path} can't be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise DriftError(f"{path} can't be used: {type(error).__name__}: {error}") from None
    if [len(statistics.bins) for statistics in state.features] != [len(each.ratios) for each in reference.features]:
        raise DriftError(f"{path} can't be used: it has other bins than the reference")
    return state


def _state(raw: dict[str, Any]) -> State:
    return State(
        features=[FeatureStatistics(**statistics) for statistics in raw["features"]],
        rows={status: int(raw["rows"][status]) for status in STATUSES},
        offsets={int(partition): int(offset) for partition, offset in raw["offsets"].items()},
        expired=int(raw["expired"]),
        # A file of an earlier release of the service doesn't say.
        last_expired=raw.get("last_expired"),
        last_message=raw["last_message"],
        cluster=raw["cluster"],
    )


def save(path: Path, state: State, reference: Reference) -> None:
    """Replace the file, durably. Raises OSError; the file is then as it was, but where only the last fsync failed."""
    content = json.dumps({"format": _FORMAT, "reference": reference.digest, **asdict(state)}, indent=1)
    temporary = path.with_name(f".{path.name}.new")
    try:
        _write(temporary, content.encode() + b"\n")
        os.rename(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _fsync_directory(path.parent)


def set_aside(path: Path) -> Path:
    """Rename a file that is of no use any more, instead of losing what is in it. Raises OSError."""
    aside = path.with_name(f"{path.name}.aside")
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, aside)
        _fsync_directory(path.parent)
    return aside


def _write(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        rest = memoryview(content)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
