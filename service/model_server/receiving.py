"""The bodies of requests while they are received and worked on: in memory, and never more than it has room for."""

import io
import threading
from typing import Any

from waitress.parser import HTTPRequestParser
from waitress.utilities import Error

# However many clients send at once, their bodies must not fill the memory.
MOST_BODY_BYTES = 64 << 20


class Overloaded(Error):
    """waitress's error for a request whose body found no room."""

    code = 503
    reason = "Service Unavailable"


class Room:
    """What the bodies of one process take together, in bytes; ``most`` is the limit. Threads may share it."""

    def __init__(self, most: int = MOST_BODY_BYTES) -> None:
        self._most = most
        self._taken = 0
        self._lock = threading.Lock()

    @property
    def taken(self) -> int:
        """Bytes in use."""
        return self._taken

    def take(self, size: int, held: int = 0) -> bool:
        """Whether there is room for ``size`` bytes, which are then taken, beside ``held`` that the body has already.

        One body alone may be of any size.
        """
        with self._lock:
            if self._taken > held and self._taken + size > self._most:
                return False
            self._taken += size
            return True

    def give_back(self, size: int) -> None:
        """Free what was taken."""
        with self._lock:
            self._taken -= size


class Parser(HTTPRequestParser):
    """waitress's parser, with a body that takes room for as long as the request exists."""

    def __init__(self, room: Room, adjustments: Any) -> None:
        super().__init__(adjustments)
        self._room = room
        self._body: _Body | None = None

    def parse_header(self, header_plus: bytes) -> None:
        """Called by waitress when the headers are there. Raises waitress's ParsingError."""
        super().parse_header(header_plus)
        # What is too large even to be read to its end needs no room.
        if self.body_rcv is not None and self.content_length < self.adj.max_request_body_size:
            self._body = self.body_rcv.buf = _Body(self._room)

    def received(self, data: bytes) -> int:
        """Called by waitress with what came; how many bytes of it were this request's."""
        consumed = super().received(data)
        if self.completed and self.error is None and self._body is not None and self._body.refused:
            self.error = Overloaded("there is no room for this body")
        return consumed

    def body(self) -> bytes:
        """The whole body."""
        return b"" if self._body is None else self._body.getfile().getvalue()


class _Body:
    """waitress's buffer for a body, which takes room as it grows: what is only announced costs no memory.

    All of a refused body is read, and forgotten: many a client looks for an answer only when it has sent everything.
    """

    def __init__(self, room: Room) -> None:
        self._room = room
        self._file = io.BytesIO()
        self._taken = 0
        self.refused = False

    def append(self, data: bytes) -> None:
        """Called by waitress."""
        if self.refused:
            return
        if self._room.take(len(data), self._taken):
            self._taken += len(data)
            self._file.write(data)
            return
        self.refused = True
        self._file.truncate(0)
        # At once, so that others which grow meanwhile aren't refused, too.
        self._give_back()

    def __len__(self) -> int:
        return self._file.getbuffer().nbytes

    def getfile(self) -> io.BytesIO:
        """Called by waitress."""
        self._file.seek(0)
        return self._file

    def close(self) -> None:
        """Called by waitress when the request is over; once is enough."""
        self._file.close()
        self._give_back()

    def _give_back(self) -> None:
        self._room.give_back(self._taken)
        self._taken = 0
