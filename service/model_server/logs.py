"""JSON log lines on standard output."""

import contextlib
import json
import logging
import os
import select
import time
import traceback
from datetime import UTC, datetime
from typing import Any

import orjson

# What collects the log cuts lines apart at 48 KiB.
_LONGEST_MESSAGE = 4000
_LONGEST_TRACEBACK = 8000


def rfc3339(seconds: float) -> str:
    """A time, in seconds since the epoch, as text in UTC, to the millisecond."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


class Log:
    """Writes one JSON object a line to a file descriptor, with a set of fields common to all lines.

    Every line has ``time`` (RFC 3339, UTC), ``level``, ``event`` and ``message``. What an exception says goes into the
    lines of ``failure`` only where ``quotes`` is set.
    """

    def __init__(self, fd: int = 1, *, quotes: bool = False, **fields: Any) -> None:
        self._fd = fd
        self._quotes = quotes
        self._fields = fields

    def bind(self, **fields: Any) -> "Log":
        """A log whose lines also carry ``fields``."""
        return Log(self._fd, quotes=self._quotes, **{**self._fields, **fields})

    def quoting(self, quotes: bool) -> "Log":
        """A log that has, or hasn't, in ``failure`` what exceptions say."""
        return Log(self._fd, quotes=quotes, **self._fields)

    def gather(self) -> "Lines":
        """Lines to be written together, for where each write would cost too much."""
        return Lines(self._fd, self._fields)

    def info(self, event: str, message: str, **fields: Any) -> None:
        """Something that is as it should be."""
        self._write("info", event, message, fields)

    def warning(self, event: str, message: str, **fields: Any) -> None:
        """Something that the service got over by itself."""
        self._write("warning", event, message, fields)

    def error(self, event: str, message: str, exception: BaseException | None = None, **fields: Any) -> None:
        """Something that failed; the traceback of ``exception`` goes to the field ``traceback``."""
        if exception is not None:
            fields["traceback"] = "".join(traceback.format_exception(exception))[-_LONGEST_TRACEBACK:]
        self._write("error", event, message, fields)

    def failure(self, event: str, message: str, exception: BaseException, **fields: Any) -> None:
        """Something that failed at what a client sent, which the words of ``exception`` may hold.

        Its type and the places in the code are logged, ``message`` before the type; its words only where that is set.
        """
        message = f"{message}: {type(exception).__name__}"
        if self._quotes:
            self.error(event, f"{message}: {exception}", exception, **fields)
        else:
            self.error(event, message, **fields, traceback=_places(exception)[-_LONGEST_TRACEBACK:])

    def _write(self, level: str, event: str, message: str, fields: dict[str, Any]) -> None:
        line = {
            "time": rfc3339(time.time()),
            "level": level,
            "event": event,
            "message": message[:_LONGEST_MESSAGE],
            **self._fields,
            **fields,
        }
        # Without spaces, as orjson writes the lines of requests: who searches the log needs one spelling.
        data = json.dumps(line, default=str, separators=(",", ":")).encode() + b"\n"
        # One write for each line: several processes share this pipe, and lines up to PIPE_BUF then never mix.
        _write(self._fd, data)


def _places(exception: BaseException) -> str:
    """A traceback without the words of exceptions, and without lines of code, which may hold such as well."""
    chain: list[BaseException] = []
    error: BaseException | None = exception
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    lines = []
    for error in reversed(chain):
        lines.append("Traceback (most recent call last):")
        for frame, number in traceback.walk_tb(error.__traceback__):
            lines.append(f'  File "{frame.f_code.co_filename}", line {number}, in {frame.f_code.co_name}')
        lines.append(type(error).__qualname__)
    return "\n".join(lines) + "\n"


class Lines:
    """Lines of a ``Log`` that are written by ``flush``, many at a time. For one thread."""

    def __init__(self, fd: int, fields: dict[str, Any]) -> None:
        self._fd = fd
        self._fields = fields
        self._waiting: list[bytes] = []
        self._second = 0
        self._second_text = ""

    def info(self, event: str, message: str, fields: dict[str, Any]) -> None:
        """Something that is as it should be; ``fields`` must be JSON values."""
        line = {"time": self._now(), "level": "info", "event": event, "message": message, **self._fields, **fields}
        self._waiting.append(orjson.dumps(line))

    def flush(self) -> None:
        """Write what waits, in pieces that no other process's lines get into."""
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, []
        piece: list[bytes] = []
        size = 0
        for line in waiting:
            if piece and size + len(line) + 1 > select.PIPE_BUF:
                _write(self._fd, b"\n".join(piece) + b"\n")
                piece, size = [], 0
            piece.append(line)
            size += len(line) + 1
        _write(self._fd, b"\n".join(piece) + b"\n")

    def _now(self) -> str:
        seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
        if seconds != self._second:
            self._second = seconds
            self._second_text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
        return f"{self._second_text}.{nanoseconds // 1_000_000:03d}Z"


def _write(fd: int, data: bytes) -> None:
    # Whoever read the log may be gone; that is no reason to stop serving.
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(fd, data) :]


class _Bridge(logging.Handler):
    def __init__(self, log: Log) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        exception = record.exc_info[1] if record.exc_info else None
        if record.levelno >= logging.ERROR:
            self._log.error("library", record.getMessage(), exception, logger=record.name)
        else:
            self._log.warning("library", record.getMessage(), logger=record.name)


def capture_library_logs(log: Log) -> None:
    """Turn warnings and errors of libraries and of the model's code into lines of ``log``."""
    root = logging.getLogger()
    root.handlers[:] = [_Bridge(log)]
    root.setLevel(logging.WARNING)
    logging.captureWarnings(True)
