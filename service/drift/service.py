"""The service: follows the live bundle, reads the topics, keeps and publishes the statistics."""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

from drift import live, state
from drift.config import Config
from drift.errors import DriftError
from drift.kafka import Kafka, Record, Unreachable
from drift.reference import Reference
from drift.state import State

_FOLLOW_SECONDS = 5.0
_CHECK_SECONDS = 5.0
_POLL_SECONDS = 1.0
# Versions of a model that one may go back to without reading the topic again.
_KEPT_STATES = 8


@dataclass(frozen=True)
class Published:
    """What is on the disk about a model, and the messages that wait. The bundle may bring no reference."""

    model: str
    reference: Reference | None = None
    state: State | None = None
    lag: int | None = None


@dataclass
class Track:
    """A topic, read by the reference of one version of a model. `saved` is what is on the disk."""

    model: str
    topic: str
    path: Path
    reference: Reference
    state: State
    saved: State
    is_changed: bool = False
    ends: dict[int, int] = field(default_factory=dict)


class Service:
    """Everything but the process and its metrics' address. `published` and `is_connected` may be read by any thread."""

    def __init__(self, config: Config) -> None:
        """Raises DriftError."""
        self._config = config
        self._kafka = Kafka(config.kafka)
        self._log = logging.getLogger("drift")
        self._bundle: Path | None = None
        self._tracks: dict[str, Track] = {}
        self._assigned: dict[str, tuple[str, set[int]]] | None = None
        self._due = dict.fromkeys(("follow", "check", "save"), 0.0)
        self._said: dict[str, str] = {}
        self.is_connected = False
        self.published = tuple(Published(model) for model in config.topics)

    def run(self, stop: threading.Event) -> None:
        """Go on until `stop` is set."""
        while not stop.is_set():
            if self._is_due("follow", _FOLLOW_SECONDS):
                self._follow()
            if self._is_due("check", _CHECK_SECONDS):
                self._check()
            self._take(list(self._kafka.poll(_POLL_SECONDS)))
            if self._is_due("save", self._config.save_seconds):
                self._save()
            self._publish()
        self._save()
        self._kafka.close()

    def _is_due(self, what: str, seconds: float) -> bool:
        now = time.monotonic()
        if now < self._due[what]:
            return False
        self._due[what] = now + seconds
        return True

    def _say(self, subject: str, problem: str | None) -> None:
        """Log a problem once, and its end."""
        before = self._said.pop(subject, None)
        if problem is not None:
            self._said[subject] = problem
            if problem != before:
                self._log.error("%s: %s", subject, problem)
        elif before is not None:
            self._log.info("%s: all is well again", subject)

    def _follow(self) -> None:
        """Turn to the references of the live bundle. A bundle never changes, so that its directory tells it."""
        try:
            directory = live.bundle(self._config.appliance_dir, self._config.config_dir)
            if directory == self._bundle:
                self._say("live bundle", None)
                return
            models = live.models(directory) if directory is not None else {}
            for model, topic in self._config.topics.items():
                found = models.get(model)
                self._turn_to(model, topic, found.reference if found else None)
        except (DriftError, OSError) as error:
            self._say("live bundle", str(error))
            return
        self._say("live bundle", None)
        self._bundle = directory
        read = ", ".join(f"{track.topic} for {model}" for model, track in self._tracks.items())
        self._log.info("live bundle: %s; reading %s", directory, read or "nothing: it brings no reference")

    def _turn_to(self, model: str, topic: str, reference: Reference | None) -> None:
        track = self._tracks.get(model)
        if track is not None:
            if track.reference == reference:
                return
            # What can't be written now is read again on the way back.
            self._save()
            del self._tracks[model]
        elif reference is None:
            return
        self._release()
        self._due["check"] = 0.0
        if reference is not None:
            self._tracks[model] = self._track(model, topic, reference)

    def _track(self, model: str, topic: str, reference: Reference) -> Track:
        """The topic by a reference: from where it was left when that was used before, else from the oldest message."""
        directory = self._config.state_dir / model
        directory.mkdir(exist_ok=True)
        name = hashlib.sha256(f"{topic}\n{reference.digest}".encode()).hexdigest()[:16]
        path = directory / f"{name}.json"
        try:
            known = state.load(path, reference)
        except DriftError as error:
            self._log.error(
                "%s; the topic is read from its oldest message, and the file is %s", error, state.set_aside(path)
            )
            known = None
        for old in sorted(directory.glob("*.json"), key=lambda file: file.stat().st_mtime)[:-_KEPT_STATES]:
            if old != path:
                old.unlink()
        known = known or State.new(reference)
        return Track(model, topic, path, reference, state=known, saved=known.copy())

    def _check(self) -> None:
        """Ask Kafka about the topics, and read on where something has become different."""
        try:
            found = {topic: self._kafka.partitions(topic) for topic in self._config.topics.values()}
            if found != self._assigned or self._kafka.is_lost:
                self._assign(found)
        except Unreachable as error:
            self.is_connected = False
            self._say("Kafka", str(error))
            return
        except OSError as error:
            self._say("statistics", f"can't be set aside: {error}")
            return
        self.is_connected = True
        self._say("Kafka", None)
        for topic, (_, partitions) in found.items():
            self._say(f"topic {topic}", None if partitions else "doesn't exist yet; it is waited for")

    def _release(self) -> None:
        """Read nothing until the next check: what would arrive needn't be what comes next in the statistics."""
        self._kafka.assign({})
        self._assigned = None

    def _assign(self, found: dict[str, tuple[str, set[int]]]) -> None:
        self._release()
        offsets = {}
        for track in self._tracks.values():
            cluster, partitions = found[track.topic]
            bounds = {partition: self._kafka.bounds(track.topic, partition) for partition in sorted(partitions)}
            self._position(track, cluster, bounds)
            offsets |= {(track.topic, partition): track.state.offsets[partition] for partition in bounds}
        self._kafka.assign(offsets)
        self._assigned = found

    def _position(self, track: Track, cluster: str, bounds: dict[int, tuple[int, int]]) -> None:
        """Where to read on. Messages that Kafka has removed meanwhile are counted; another topic is begun anew."""
        known = track.state
        if known.cluster not in (None, cluster):
            self._begin_anew(track, f"is of the Kafka cluster {known.cluster}, and this is {cluster}")
        elif any(known.offsets.get(partition, 0) > high for partition, (_, high) in bounds.items()):
            self._begin_anew(track, f"holds more messages than {track.topic}, which was truncated or made anew")
        known = track.state
        known.cluster = cluster
        for partition, (low, high) in bounds.items():
            offset = known.offsets.setdefault(partition, low)
            if offset < low:
                self._log.error(
                    "%s/%d: %d messages expired before they were read", track.topic, partition, low - offset
                )
                known.expired += low - offset
                known.last_expired = time.time()
                known.offsets[partition] = low
            track.ends[partition] = high
        track.is_changed = True

    def _begin_anew(self, track: Track, reason: str) -> None:
        self._log.warning(
            "%s %s: statistics begin anew from the oldest message, the earlier ones are %s",
            track.path,
            reason,
            state.set_aside(track.path),
        )
        track.state = State.new(track.reference)
        track.ends = {}

    def _take(self, records: list[Record]) -> None:
        if self._kafka.is_down:
            self.is_connected = False
        if self._kafka.is_lost:
            self._due["check"] = 0.0
        tracks = {track.topic: track for track in self._tracks.values()}
        messages: dict[str, list[bytes | None]] = {topic: [] for topic in tracks}
        for record in records:
            track = tracks[record.topic]
            known = track.state
            if record.next_offset <= known.offsets[record.partition]:
                continue
            known.offsets[record.partition] = record.next_offset
            track.is_changed = True
            if not record.is_end:
                messages[record.topic].append(record.value)
                # A producer's clock may be wrong; nothing is from the future.
                moment = min(record.timestamp or time.time(), time.time())
                known.last_message = max(known.last_message or 0.0, moment)
        for topic, values in messages.items():
            tracks[topic].state.add(values, tracks[topic].reference)

    def _save(self) -> None:
        """Put on the disk what has changed. What can't be written is kept, and tried again."""
        problem = None
        for track in self._tracks.values():
            if not track.is_changed:
                continue
            try:
                state.save(track.path, track.state, track.reference)
            except OSError as error:
                problem = f"{track.path} can't be written: {error.strerror}"
                continue
            track.saved = track.state.copy()
            track.is_changed = False
        self._say("statistics", problem)

    def _publish(self) -> None:
        """Only what is on the disk: after a crash, no count goes back behind what was seen."""
        self.published = tuple(self._publication(model) for model in self._config.topics)

    def _publication(self, model: str) -> Published:
        track = self._tracks.get(model)
        if track is None:
            return Published(model)
        saved = track.saved.offsets
        for partition in track.ends:
            track.ends[partition] = self._kafka.end(track.topic, partition) or track.ends[partition]
        lag = sum(max(end - saved.get(partition, 0), 0) for partition, end in track.ends.items())
        return Published(model, track.reference, track.saved, lag if track.ends or self._assigned else None)
