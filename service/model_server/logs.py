"""JSON log lines on standard output."""

import json
import logging
import os
import traceback
from datetime import UTC, datetime
from typing import Any

# What collects the log cuts lines apart at 48 KiB.
_LONGEST_MESSAGE = 4000
_LONGEST_TRACEBACK = 8000


class Log:
    """Writes one JSON object a line to a file descriptor, with a set of fields common to all lines.

    Every line has ``time`` (RFC 3339, UTC), ``level``, ``event`` and ``message``.
    """

    def __init__(self, fd: int = 1, **fields: Any) -> None:
        self._fd = fd
        self._fields = fields

    def bind(self, **fields: Any) -> "Log":
        """A log whose lines also carry ``fields``."""
        return Log(self._fd, **{**self._fields, **fields})

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

    def _write(self, level: str, event: str, message: str, fields: dict[str, Any]) -> None:
        time = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = {
            "time": time,
            "level": level,
            "event": event,
            "message": message[:_LONGEST_MESSAGE],
            **self._fields,
            **fields,
        }
        data = json.dumps(line, default=str).encode() + b"\n"
        # One write for each line: several processes share this pipe, and lines up to PIPE_BUF then never mix.
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError:
            # Whoever read the log is gone; that is no reason to stop serving.
            return


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
