"""http.client over Unix sockets, and exchanges that end by a deadline whatever the other side does."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import stat
import threading
from dataclasses import dataclass
from pathlib import Path

MAX_ANSWER_BYTES = 4 * 1024 * 1024


class ExchangeError(Exception):
    """No usable answer; the text says why."""


@dataclass(frozen=True)
class Answer:
    """An HTTP answer. Header names are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes
    closes: bool
    """Whether the other side ends the connection after this answer."""


class UnixConnection(http.client.HTTPConnection):
    """An HTTP connection to a Unix socket. Raises PermissionError where the socket isn't for the present user."""

    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        # Model code may write in this directory: a link there must not lead root to somebody else's socket.
        if not stat.S_ISSOCK(os.lstat(self._path).st_mode):
            raise ConnectionError(f"{self._path} isn't a socket")
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(self.timeout)
            sock.connect(str(self._path))
        except BaseException:
            sock.close()
            raise
        self.sock = sock


def exchange(
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    body: bytes | None = None,
    headers: dict[str, str] | None = None,
    *,
    timeout: float,
) -> Answer:
    """Send one request and read the whole answer within `timeout` seconds.

    Raises ExchangeError; PermissionError passes through.
    """
    late = threading.Event()
    sock: socket.socket | None = connection.sock

    def cut() -> None:
        # A socket timeout starts afresh with every byte; this ends an answer that only drips.
        late.set()
        if sock is not None:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(timeout, cut)
    timer.daemon = True
    timer.start()
    try:
        if sock is None and connection.auto_open:
            connection.connect()
            sock = connection.sock
        connection.request(method, path, body=body, headers=headers or {})
        response = connection.getresponse()
        content = response.read(MAX_ANSWER_BYTES + 1)
        if late.is_set():
            raise TimeoutError
        if len(content) > MAX_ANSWER_BYTES:
            raise ExchangeError(f"the answer is longer than {MAX_ANSWER_BYTES} bytes")
        return Answer(
            response.status,
            {name.lower(): value for name, value in response.getheaders()},
            content,
            response.will_close,
        )
    except PermissionError:
        raise
    except FileNotFoundError:
        raise ExchangeError("there is no socket") from None
    except (OSError, http.client.HTTPException) as error:
        connection.close()
        if late.is_set() or isinstance(error, TimeoutError):
            raise ExchangeError(f"no whole answer within {timeout:g} s") from None
        text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ExchangeError(text or type(error).__name__) from None
    finally:
        timer.cancel()
