"""HTTP over Unix sockets and TCP: exchanges that end by a deadline, whatever the other side does.

It doesn't use http.client, whose import alone takes longer than all the requests of a rollback.
"""

from __future__ import annotations

import os
import socket
import stat
import time
from pathlib import Path
from typing import NamedTuple

MAX_ANSWER_BYTES = 4 * 1024 * 1024
_MAX_HEAD_BYTES = 65536
_PIECE_BYTES = 65536
_HEXADECIMAL = frozenset(b"0123456789abcdefABCDEF")
_MOST_DIGITS = 15
_WITH_BODY = ("PATCH", "POST", "PUT")


class ExchangeError(Exception):
    """No usable answer; the text says why."""


class Disconnected(ExchangeError):
    """Nobody is at the other end, or it went away before the answer began."""


class Answer(NamedTuple):
    """An HTTP answer. Header names are in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes
    closes: bool
    """Whether the other side ends the connection after this answer."""


class Connection:
    """A connection that the first exchange opens. Without `auto_open`, one that has been closed stays closed."""

    default_port = 80

    def __init__(self, host: str, port: int | None, timeout: float) -> None:
        self.host = host
        self.port = self.default_port if port is None else port
        self.timeout = timeout
        self.auto_open = True
        self.sock: socket.socket | None = None

    def connect(self) -> None:
        """Open it anew. Raises OSError."""
        # As bytes: for text, Python would load its tables of international names.
        host = self.host.encode() if self.host.isascii() else self.host
        self.sock = socket.create_connection((host, self.port), self.timeout)
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def close(self) -> None:
        """Close it; nothing happens where it isn't open."""
        sock, self.sock = self.sock, None
        if sock is not None:
            sock.close()


class UnixConnection(Connection):
    """A connection to a Unix socket. Raises PermissionError where the socket isn't for the present user."""

    def __init__(self, path: Path, timeout: float) -> None:
        super().__init__("localhost", None, timeout)
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
    connection: Connection,
    method: str,
    path: str,
    body: bytes | None = None,
    headers: dict[str, str] | None = None,
    *,
    timeout: float,
) -> Answer:
    """Send one request and read the whole answer within `timeout` seconds.

    Raises ExchangeError, and ValueError where the request can't be sent as it is; PermissionError passes through.
    """
    message = _message(connection, method, path, body, headers or {})
    deadline = time.monotonic() + timeout
    whole = False
    try:
        if connection.sock is None:
            if not connection.auto_open:
                raise ConnectionError("the connection was closed")
            connection.connect()
        connection.sock.settimeout(_left(deadline))
        connection.sock.sendall(message)
        answer = _Reader(connection.sock, deadline).answer(method)
        whole = not answer.closes
        return answer
    except PermissionError:
        raise
    except FileNotFoundError:
        raise ExchangeError("there is no socket") from None
    except TimeoutError:
        raise ExchangeError(f"no whole answer within {timeout:g} s") from None
    except OSError as error:
        raise Disconnected(error.strerror or str(error) or type(error).__name__) from None
    finally:
        # What is left of an answer must not be taken for the next one.
        if not whole:
            connection.close()


def _message(connection: Connection, method: str, path: str, body: bytes | None, headers: dict[str, str]) -> bytes:
    if not _is_word(path):
        raise ValueError("a path with characters that don't belong into one")
    host = f"[{connection.host}]" if ":" in connection.host else connection.host
    port = "" if connection.port == connection.default_port else f":{connection.port}"
    about = {"host": host + port, "accept-encoding": "identity"}
    if body is not None or method in _WITH_BODY:
        about["content-length"] = str(len(body or b""))
    for name, value in headers.items():
        if not _is_word(name) or ":" in name or any(c in value for c in "\r\n\0"):
            raise ValueError("a header that would end before its end")
        about[name.lower()] = value
    if "transfer-encoding" in about:
        about.pop("content-length", None)
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in about.items()), "", ""]
    # One packet for both: a body on its own would wait until the head is acknowledged.
    return "\r\n".join(lines).encode("latin-1") + (body or b"")


def _is_word(text: str) -> bool:
    return text.isascii() and text.isprintable() and " " not in text and text != ""


def _left(deadline: float) -> float:
    """The time until a deadline in seconds. Raises TimeoutError once it has come."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


class _Reader:
    """One answer from a socket. Raises ExchangeError, OSError."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock = sock
        self._deadline = deadline
        self._read = bytearray()

    def answer(self, method: str) -> Answer:
        """The answer to a request with `method`."""
        status = 100
        while status < 200:
            # Of several, only the last is the answer.
            version, status, headers = self._head()
        said = headers.get("connection", "").lower()
        closes = "close" in said or (version == "HTTP/1.0" and "keep-alive" not in said)
        length = headers.get("content-length")
        if method == "HEAD" or status in (204, 304):
            body = b""
        elif headers.get("transfer-encoding", "").lower() == "chunked":
            body = self._chunks()
        elif length is not None:
            if not length.isdecimal() or len(length) > _MOST_DIGITS:
                raise ExchangeError(f"the answer has the length {length[:100]!r}")
            body = self._take(int(length))
        else:
            closes, body = True, self._rest()
        # Whatever follows is no answer to anything that was asked.
        return Answer(status, headers, body, closes or bool(self._read))

    def _head(self) -> tuple[str, int, dict[str, str]]:
        first, *lines = self._until(b"\r\n\r\n", _MAX_HEAD_BYTES).decode("latin-1").split("\r\n")
        version, _, rest = first.partition(" ")
        status = rest.partition(" ")[0]
        if version not in ("HTTP/1.0", "HTTP/1.1") or len(status) != 3 or not status.isdecimal() or status < "100":
            raise ExchangeError(f"the answer isn't HTTP: {first[:100]!r}")
        headers = {}
        for line in lines:
            name, colon, value = line.partition(":")
            if not colon:
                raise ExchangeError(f"the answer's head has the line {line[:100]!r}")
            headers[name.strip().lower()] = value.strip()
        return version, int(status), headers

    def _chunks(self) -> bytes:
        body = bytearray()
        while True:
            size = self._until(b"\r\n", _MAX_HEAD_BYTES).partition(b";")[0].strip()
            if not size or not _HEXADECIMAL.issuperset(size) or len(size) > _MOST_DIGITS:
                raise ExchangeError(f"the answer has a piece of the length {size[:100]!r}")
            length = int(size, 16)
            if length == 0:
                break
            _limit(len(body) + length)
            body += self._take(length)
            if self._take(2) != b"\r\n":
                raise ExchangeError("the answer has a piece that is longer than it says")
        while self._until(b"\r\n", _MAX_HEAD_BYTES):
            pass
        return bytes(body)

    def _until(self, end: bytes, most: int) -> bytes:
        """What comes before `end`, which is taken, too."""
        while (place := self._read.find(end)) < 0:
            if len(self._read) > most:
                raise ExchangeError(f"the answer has a head of more than {most} bytes")
            if not self._more():
                raise ConnectionError("the connection was closed before the answer")
        found = bytes(self._read[:place])
        del self._read[: place + len(end)]
        return found

    def _take(self, length: int) -> bytes:
        _limit(length)
        while len(self._read) < length:
            if not self._more():
                raise ExchangeError("the connection was closed within the answer")
        found = bytes(self._read[:length])
        del self._read[:length]
        return found

    def _rest(self) -> bytes:
        while self._more():
            _limit(len(self._read))
        return self._take(len(self._read))

    def _more(self) -> bool:
        """Read on; False where the other side has closed the connection."""
        # Each time for what is left: an answer that only drips ends, too.
        self._sock.settimeout(_left(self._deadline))
        piece = self._sock.recv(_PIECE_BYTES)
        self._read += piece
        return bool(piece)


def _limit(length: int) -> None:
    if length > MAX_ANSWER_BYTES:
        raise ExchangeError(f"the answer is longer than {MAX_ANSWER_BYTES} bytes")
