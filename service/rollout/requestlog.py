"""One request through the logs: what nginx said about it, and what the colours said.

Neither logs inputs. The access logs are those of production and of the idle colour, rotated ones included; the colours'
lines are in the journal. logrotate and journald decide how far back they reach.
"""

from __future__ import annotations

import datetime
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rollout import host
from rollout.config import Config
from rollout.errors import Failed
from rollout.report import Result
from rollout.text import tidy

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
"""What nginx takes over from a client; any other request gets an id of nginx's own, which matches it, too."""
_JOURNAL_SECONDS = 120.0
# A colour may end a request before nginx does, whose times are whole seconds, or long after the client has gone.
_BEFORE_SECONDS, _AFTER_SECONDS = 10, 300
# An id that a client uses again and again is no id.
_MOST_LINES = 100


def find(config: Config, request_id: str) -> Result:
    """The lines of nginx and of the colours about a request, oldest first. `request_id` must match REQUEST_ID.

    Raises Failed where there is none, or the journal can't be read, and OSError where an access log can't be.
    """
    nginx = _of_nginx(config.access_log, request_id)
    model = _of_model(config, request_id, nginx)
    if not nginx and not model:
        raise Failed(
            f"no log holds the request {request_id}: the id is the answer's X-Request-ID, and the access logs beside "
            f"{config.access_log} and the journal reach back only so far"
        )
    return Result(
        f"request {request_id}: {len(nginx)} of nginx's lines, {len(model)} of the model's",
        details={"request_id": request_id, "nginx": nginx, "model": model},
        lines=[
            f"{name}  {json.dumps(entry)}" for name, found in (("nginx", nginx), ("model", model)) for entry in found
        ],
    )


def _of_nginx(access_log: Path, request_id: str) -> list[dict[str, Any]]:
    # The other environment's log lies beside it, and so do the rotated ones.
    found = []
    for path in access_log.parent.glob("*access.log*"):
        try:
            with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
                found += _entries(stream, request_id)
        # Rotation renames and compresses at any time.
        except (FileNotFoundError, EOFError, gzip.BadGzipFile, zlib.error):
            continue
    return sorted(found, key=_time)[-_MOST_LINES:]


def _of_model(config: Config, request_id: str, nginx: list[dict[str, Any]]) -> list[dict[str, Any]]:
    units = [f"--unit={config.unit_of(colour)}" for colour in config.colours]
    command = ["journalctl", *units, "--output=cat", "--no-pager", "--quiet"]
    # Without the time, all of the journal has to be read.
    moments = [moment for entry in nginx if (moment := _moment(entry)) is not None]
    if moments:
        command.append(f"--since=@{int(min(start for start, _ in moments)) - _BEFORE_SECONDS}")
        command.append(f"--until=@{int(max(end for _, end in moments)) + _AFTER_SECONDS}")
    command += [f"--lines={_MOST_LINES}", f"--grep={re.escape(request_id)}"]
    answer = host.run(command, _JOURNAL_SECONDS)
    # 1 without a complaint says that nothing matches.
    if answer.returncode not in (0, 1) or (answer.returncode and answer.stderr.strip()):
        raise Failed(f"the journal can't be read: {tidy(answer.stderr) or f'exit status {answer.returncode}'}")
    return sorted(_entries((line.encode() for line in answer.stdout.splitlines()), request_id), key=_time)


def _entries(lines: Iterable[bytes], request_id: str) -> Iterator[dict[str, Any]]:
    """The JSON objects among `lines` that are about the request."""
    mark = request_id.encode()
    for line in lines:
        if mark in line:
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and entry.get("request_id") == request_id:
                yield entry


def _time(entry: dict[str, Any]) -> str:
    return str(entry.get("time", ""))


def _moment(entry: dict[str, Any]) -> tuple[float, float] | None:
    """When a request came and when nginx was done with it, in seconds since the epoch."""
    try:
        end = datetime.datetime.fromisoformat(entry["time"]).timestamp()
        return end - float(entry["request_seconds"]), end
    except (KeyError, ValueError, TypeError):
        return None
