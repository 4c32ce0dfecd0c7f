"""The service's configuration: one JSON file, which may hold passwords."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drift.errors import DriftError

DEFAULT_PATH = Path("/etc/appliance/drift.json")
_MODEL = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,62}")
_ADDRESS = re.compile(r"\[?([^\[\]]+)\]?:([0-9]{1,5})")


@dataclass(frozen=True)
class Config:
    """What the service goes by.

    `kafka` holds librdkafka's properties, `topics` the topic of each model. `appliance_dir` and `config_dir` are where
    docs/contracts.md says which bundle is live.
    """

    kafka: dict[str, Any]
    topics: dict[str, str]
    listen_address: str = "127.0.0.1:9146"
    state_dir: Path = Path("/var/lib/appliance-drift")
    appliance_dir: Path = Path("/var/lib/appliance")
    config_dir: Path = Path("/etc/appliance")
    save_seconds: float = 2.0

    @property
    def listen(self) -> tuple[str, int]:
        """Host and port of `listen_address`."""
        host, port = _ADDRESS.fullmatch(self.listen_address).groups()
        return host, int(port)


def read(path: Path) -> Config:
    """The configuration in `path`. Raises DriftError."""
    try:
        raw = json.loads(path.read_bytes())
    except OSError as error:
        raise DriftError(f"{path} can't be read: {error.strerror}") from None
    except ValueError as error:
        raise DriftError(f"{path} isn't JSON: {error}") from None
    try:
        return _checked(raw)
    except DriftError as error:
        raise DriftError(f"{path}: {error}") from None


def _checked(raw: Any) -> Config:
    if not isinstance(raw, dict):
        raise DriftError("must be a JSON object")
    known = Config.__dataclass_fields__
    for key in raw.keys() - known.keys():
        raise DriftError(f"{key} isn't a setting; these are: {', '.join(known)}")
    kafka, topics = raw.get("kafka"), raw.get("topics")
    # The value stays out of the message: it may hold a password.
    if not isinstance(kafka, dict) or not kafka.get("bootstrap.servers"):
        raise DriftError('kafka must hold "bootstrap.servers" and may hold further properties of librdkafka')
    if not isinstance(topics, dict) or not topics:
        raise DriftError(f"topics is {topics!r}: it must name a topic for at least one model")
    for model, topic in topics.items():
        if not _MODEL.fullmatch(model) or not isinstance(topic, str) or not topic:
            raise DriftError(f"topics: {model!r}: {topic!r} isn't a model's name with a topic's name")
    if len(set(topics.values())) < len(topics):
        raise DriftError("topics: each model needs a topic of its own")
    for key in ("state_dir", "appliance_dir", "config_dir", "listen_address"):
        if key in raw and (not isinstance(raw[key], str) or not raw[key]):
            raise DriftError(f"{key} is {raw[key]!r}: it must be a text")
    seconds = raw.get("save_seconds", 0)
    if isinstance(seconds, bool) or not isinstance(seconds, int | float) or seconds < 0:
        raise DriftError(f"save_seconds is {seconds!r}: it must be a number from 0 on")
    paths = {key: Path(raw[key]) for key in ("state_dir", "appliance_dir", "config_dir") if key in raw}
    config = Config(**{**raw, **paths})
    if not _ADDRESS.fullmatch(config.listen_address):
        raise DriftError(f"listen_address is {config.listen_address!r}: it must be HOST:PORT")
    return config
