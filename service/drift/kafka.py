"""Reading topics from given offsets. The group's own offsets aren't used: ours are kept with the statistics."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from confluent_kafka import OFFSET_INVALID, Consumer, KafkaError, KafkaException, TopicPartition

from drift.errors import DriftError

# Besides these and `bootstrap.servers`, everything is the operator's.
_OURS = {
    "enable.auto.commit": False,
    # Where the offsets that are kept don't fit the topic any more, `service.py` decides what to do.
    "auto.offset.reset": "error",
    "enable.partition.eof": True,
}
_DEFAULTS = {
    # Never joined, but the library wants one.
    "group.id": "appliance-drift",
    "client.id": "appliance-drift",
    # Enough to be busy, and a bound for the memory.
    "queued.max.messages.kbytes": 16384,
}
_BATCH = 2000
_ANSWER_SECONDS = 5.0
_SILENT_SECONDS = 60.0
_NUMBER = re.compile(r"\d+")


class Unreachable(Exception):
    """Kafka doesn't answer, or refuses; later it may."""


@dataclass(frozen=True)
class Record:
    """A message, or where `is_end` the end of a partition. `next_offset` is what to read after it.

    `timestamp` is in seconds since the epoch, None where the message bears none.
    """

    topic: str
    partition: int
    next_offset: int
    value: bytes | None
    timestamp: float | None
    is_end: bool = False


class Seldom(logging.Filter):
    """Lets a message through once in a while: librdkafka repeats itself many times a second where no broker answers.

    Messages that differ in numbers alone are the same.
    """

    def __init__(self, seconds: float = _SILENT_SECONDS) -> None:
        super().__init__()
        self._seconds = seconds
        self._told: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        now = time.monotonic()
        self._told = {text: told for text, told in self._told.items() if told + self._seconds > now}
        text = _NUMBER.sub("0", record.getMessage())
        if text in self._told:
            return False
        self._told[text] = now
        return True


class Kafka:
    """A consumer. For one thread."""

    def __init__(self, settings: dict[str, Any]) -> None:
        """Raises DriftError where librdkafka refuses the settings; no connection is made yet."""
        self._log = logging.getLogger("librdkafka")
        client = self._log.getChild("client")
        for log in (self._log, client):
            log.filters[:] = [Seldom()]
        try:
            self._consumer = Consumer({**_DEFAULTS, **settings, **_OURS, "error_cb": self._on_error}, logger=client)
        except (KafkaException, ValueError, TypeError) as error:
            raise DriftError(f"kafka: librdkafka refuses the settings: {_words(error)}") from None
        self.is_down = False
        self.is_lost = False

    def partitions(self, topic: str) -> tuple[str, set[int]]:
        """The cluster's id and the topic's partitions, none where there is no such topic yet. Raises Unreachable."""
        try:
            metadata = self._consumer.list_topics(topic, timeout=_ANSWER_SECONDS)
        except KafkaException as error:
            raise Unreachable(_words(error)) from None
        found = metadata.topics[topic]
        if found.error is not None and found.error.code() != KafkaError.UNKNOWN_TOPIC_OR_PART:
            raise Unreachable(f"topic {topic}: {found.error.str()}")
        self.is_down = False
        return metadata.cluster_id, set(found.partitions)

    def bounds(self, topic: str, partition: int) -> tuple[int, int]:
        """The offsets of the oldest message that is left and of the next one to come. Raises Unreachable."""
        try:
            return self._consumer.get_watermark_offsets(TopicPartition(topic, partition), timeout=_ANSWER_SECONDS)
        except KafkaException as error:
            raise Unreachable(f"topic {topic}: {_words(error)}") from None

    def end(self, topic: str, partition: int) -> int | None:
        """The offset of the next message to come, as of the last answer; None where there was none."""
        try:
            _, high = self._consumer.get_watermark_offsets(TopicPartition(topic, partition), cached=True)
        except KafkaException:
            return None
        return None if high in (OFFSET_INVALID, -1) else high

    def assign(self, offsets: dict[tuple[str, int], int]) -> None:
        """From now on read these partitions, each from its offset, and nothing else."""
        self.is_lost = False
        # First nothing at all: no message that was fetched for earlier offsets may still come.
        self._consumer.unassign()
        self._consumer.assign([TopicPartition(*key, offset) for key, offset in offsets.items()])

    def poll(self, seconds: float) -> Iterator[Record]:
        """What has arrived, after at most `seconds`. Sets `is_lost` where a partition can't be read on."""
        for message in self._consumer.consume(_BATCH, seconds):
            error = message.error()
            if error is None:
                kind, milliseconds = message.timestamp()
                timestamp = milliseconds / 1000 if kind and milliseconds >= 0 else None
                key = message.topic(), message.partition()
                yield Record(*key, message.offset() + 1, message.value(), timestamp)
            elif error.code() == KafkaError._PARTITION_EOF:
                yield Record(message.topic(), message.partition(), message.offset(), None, None, is_end=True)
            else:
                self._log.warning("%s", error.str())
                self.is_lost |= error.code() == KafkaError._AUTO_OFFSET_RESET

    def close(self) -> None:
        """Disconnect."""
        self._consumer.close()

    def _on_error(self, error: KafkaError) -> None:
        self.is_down |= error.code() == KafkaError._ALL_BROKERS_DOWN
        self._log.warning("%s", error.str())


def _words(error: Exception) -> str:
    inner = error.args[0] if error.args else error
    return inner.str() if isinstance(inner, KafkaError) else str(inner)
