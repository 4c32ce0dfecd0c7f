"""The front door: what a client of the appliance sees."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple
from urllib.parse import urlsplit

from rollout.errors import ApplianceError, Refused
from rollout.report import progress
from rollout.text import tidy
from rollout.unixhttp import Answer, Connection, Disconnected, ExchangeError, exchange

_RETRIES = 3
_RETRY_SECONDS = 0.3


class WrongAnswer(ApplianceError):
    """The front door answered otherwise than it should."""


class FrontDoorGone(WrongAnswer):
    """The front door itself is gone, which says nothing about a colour: for one that is dead or hangs it answers.

    Not where an answer breaks off: that may be the colour's end.
    """


class Verification(NamedTuple):
    """What a successful verification measured."""

    first_ms: float | None
    """Milliseconds from the switch to the first 200 of the new colour; None where there was no switch."""
    requests: int


class _TlsConnection(Connection):
    """A connection with TLS."""

    default_port = 443

    def connect(self) -> None:
        # Loaded only where it is needed, which is where nginx isn't on this host.
        import ipaddress
        import ssl

        context = ssl.create_default_context()
        try:
            loopback = ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            loopback = self.host == "localhost"
        if loopback:
            # The certificate is made out to the public name; on loopback there is nobody in between to guard against.
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        super().connect()
        try:
            self.sock = context.wrap_socket(self.sock, server_hostname=self.host)
        except BaseException:
            self.close()
            raise


class FrontDoor:
    """`POST /predict` through nginx; `timeout` in seconds for one request, `mark` gives the beginning of its id."""

    def __init__(self, url: str, timeout: float, mark: Callable[[], str] = lambda: "appliance-") -> None:
        self.url = url
        self._mark = mark
        self._parts = urlsplit(url)
        self._timeout = timeout

    def _connection(self) -> Connection:
        kind = Connection if self._parts.scheme == "http" else _TlsConnection
        return kind(self._parts.hostname or "", self._parts.port, self._timeout)

    def _ask(
        self, connection: Connection, body: bytes, request_id: str, track: str = "live", timeout: float | None = None
    ) -> Answer:
        # A track that is asked for is served whatever the split is, and in maintenance.
        headers = {"Content-Type": "application/json", "X-Request-ID": request_id, "X-Model-Track": track}
        timeout = self._timeout if timeout is None else timeout
        try:
            return exchange(connection, "POST", f"{self._parts.path}/predict", body, headers, timeout=timeout)
        except (PermissionError, ValueError) as error:
            raise ExchangeError(str(error)) from None

    def send(self, body: bytes, request_id: str, track: str) -> Answer:
        """One request on a fresh connection to the `live` or the `idle` colour. Raises ExchangeError."""
        connection = self._connection()
        try:
            return self._ask(connection, body, request_id, track)
        finally:
            connection.close()

    def open_held(self, body: bytes, patience: float | None = None) -> Connection:
        """Open a connection and use it once, as a client does that has been there since before the switch.

        The answer may be anything, and needn't come within `patience` seconds (by default the time of any request): a
        swap away from a dead or a hanging colour must be possible. Then the connection is one that wasn't used yet.
        Raises Refused where nobody accepts connections, since then no switch could be verified.
        """
        connection = self._connection()
        try:
            connection.connect()
            try:
                self._ask(connection, body, f"{self._mark()}before", timeout=patience)
            except ExchangeError as error:
                progress(f"the live colour doesn't answer through {self.url}: {tidy(error)}; going on")
            if connection.sock is None:
                connection.connect()
        except OSError as error:
            connection.close()
            raise Refused(
                f"the front door {self.url} doesn't answer: {error.strerror or tidy(error)}; start nginx first: "
                f"systemctl status nginx"
            ) from None
        # From here on a closed connection is a finding, not a reason to open another one.
        connection.auto_open = False
        return connection

    def verify(
        self,
        colour: str,
        body: bytes,
        count: int,
        held: Connection,
        since: float | None = None,
        between: Callable[[], None] = lambda: None,
    ) -> Verification:
        """Send `count` requests on fresh connections and `count` on `held`; each must end in a 200 of `colour`.

        They take turns, so that `held` isn't idle for so long that nginx would close it.
        `since` is the monotonic time of the switch in seconds; `between` is called before each request. Raises
        WrongAnswer at the first answer that isn't, because every further second on a broken colour costs requests.
        """
        first_ms = None
        for number in range(1, count + 1):
            fresh = self._connection()
            try:
                self._expect(colour, fresh, body, f"fresh connection {number} of {count}", f"fresh-{number}", between)
            finally:
                fresh.close()
            if first_ms is None and since is not None:
                first_ms = round((time.monotonic() - since) * 1000, 1)
            what = f"request {number} of {count} on a held connection"
            self._expect(colour, held, body, what, f"held-{number}", between)
        return Verification(first_ms, 2 * count)

    def answers_as(self, colour: str, body: bytes) -> str | None:
        """What is wrong with one answer on a fresh connection, or None."""
        connection = self._connection()
        try:
            self._expect(colour, connection, body, "fresh connection", "after")
        except WrongAnswer as fault:
            return fault.message
        finally:
            connection.close()
        return None

    def _expect(
        self,
        colour: str,
        connection: Connection,
        body: bytes,
        what: str,
        mark: str,
        between: Callable[[], None] = lambda: None,
    ) -> None:
        for left in range(_RETRIES, -1, -1):
            between()
            try:
                answer = self._ask(connection, body, f"{self._mark()}{mark}")
            except ExchangeError as error:
                kind = FrontDoorGone if isinstance(error, Disconnected) else WrongAnswer
                raise kind(f"{self.url}/predict, {what}: no answer: {tidy(error)}") from None
            got = answer.headers.get("x-model-colour")
            # A healthy colour sheds load with a 503: that alone must not undo a switch.
            if not left or (answer.status, got) != (503, colour):
                break
            time.sleep(_RETRY_SECONDS)
        if answer.status != 200 or got != colour:
            text = "" if answer.status == 200 else f": {tidy(answer.body.decode(errors='replace'), 200)}"
            raise WrongAnswer(
                f"{self.url}/predict, {what}: {answer.status} from {tidy(got, 40) if got else 'no colour'} "
                f"instead of 200 from {colour}{text}"
            )
