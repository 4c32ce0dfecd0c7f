"""What the worker's and the control process's HTTP side have in common.

waitress reads and parses requests in one loop. Those for the routes that predict are answered from that loop, without
a thread of their own and without WSGI (``predictions``); everything else is a Flask application in waitress's threads.
"""

import contextlib
import functools
import json
import os
import re
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import flask
from waitress import wasyncore
from waitress.channel import ClientDisconnected, HTTPChannel
from waitress.server import create_server
from waitress.task import ErrorTask, ThreadedTaskDispatcher, WSGITask
from werkzeug.exceptions import HTTPException

from model_server.bundle import Bundle
from model_server.config import Config
from model_server.core import Call
from model_server.logs import Lines, Log
from model_server.metrics import Metrics
from model_server.receiving import Overloaded, Parser, Room

if TYPE_CHECKING:
    from model_server.model import Model

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
# Longer than the minute for which nginx keeps idle connections, so that nginx is always the one to close them.
_CHANNEL_SECONDS = 120
# How often waitress gets to look for idle connections.
TURN_SECONDS = 5.0
# Not logged while they answer as they should: asked every few seconds, they would bury the predictions.
_QUIET = frozenset(("/health", "/metrics"))
# What is longer is cut in the log: both come from the client, and a line must stay a line.
_LOGGED_METHOD, _LOGGED_PATH = 20, 200
# How long idle connections stay open at the end, for requests that were under way on them.
_LINGER_SECONDS = 0.25
_CONNECTION_LIMIT = 4096
_EXPOSED = ("Access-Control-Expose-Headers", "X-Request-ID, X-Model-Colour, X-Model-Version, Retry-After")
# A number of bytes that is never reached.
_NO_LIMIT = 1 << 40


class Frame:
    """What every answer has in common: its headers, its log line and its place in the metrics."""

    def __init__(
        self,
        config: Config,
        bundle: Bundle,
        metrics: Metrics,
        log: Log,
    ) -> None:
        self.model = bundle.models[0].name
        self._metrics = metrics
        self._log = log
        self._origins = frozenset(config.cors_origins)
        self.static_headers = (("X-Model-Colour", config.colour), ("X-Model-Version", bundle.version))

    def request_id(self, given: str | None) -> str:
        """The caller's identifier where it is acceptable, else a new one."""
        if given is not None and _REQUEST_ID.fullmatch(given):
            return given
        return os.urandom(16).hex()

    def headers(self, request_id: str) -> tuple[tuple[str, str], ...]:
        """The headers of an answer."""
        return (("X-Request-ID", request_id), *self.static_headers)

    def cors_headers(self, origin: str | None) -> tuple[tuple[str, str], ...]:
        """What tells a browser that a page of ``origin`` may read the answer; nothing for other pages."""
        if not self.may_read(origin):
            return (("Vary", "Origin"),) if self._origins else ()
        if "*" in self._origins:
            return (("Access-Control-Allow-Origin", "*"), _EXPOSED)
        return (("Access-Control-Allow-Origin", str(origin)), ("Vary", "Origin"), _EXPOSED)

    def may_read(self, origin: str | None) -> bool:
        """Whether pages of ``origin`` may read answers."""
        return origin is not None and ("*" in self._origins or origin in self._origins)

    def record(self, request_id: str, method: str, path: str, rule: str, status: int, started: float) -> None:
        """Count an answer under ``rule`` and log it; ``started`` is of ``time.perf_counter``."""
        self._metrics.count_request(method, rule, status)
        if path in _QUIET and status in (200, 503):
            return
        fields = _logged(request_id, method, path, status, started)
        self._log.info("request", f"{fields['method']} {fields['path']} {status}", **fields)

    def note(
        self,
        lines: Lines,
        request_id: str,
        method: str,
        path: str,
        status: int,
        started: float,
        model: "Model",
        call: Call | None,
    ) -> None:
        """Log the answer to a request for a prediction, with where its time went if it got as far as the model."""
        fields = _logged(request_id, method, path, status, started)
        fields["model"], fields["version"] = model.name, model.version
        if call is not None:
            fields["rows"] = len(call.rows)
            fields["queue_ms"] = round(call.queue_seconds * 1000, 3)
            fields["model_ms"] = round(call.model_seconds * 1000, 3)
        lines.info("request", f"{fields['method']} {fields['path']} {status}", fields)


def _logged(request_id: str, method: str, path: str, status: int, started: float) -> dict[str, Any]:
    return {
        "request_id": request_id,
        "method": method[:_LOGGED_METHOD],
        "path": path[:_LOGGED_PATH],
        "status": status,
        "duration_ms": round((time.perf_counter() - started) * 1000, 3),
    }


def json_response(document: Any, status: int = 200) -> flask.Response:
    """A JSON answer."""
    return flask.Response(json.dumps(document), status, content_type="application/json")


def error_response(message: str, status: int) -> flask.Response:
    """The one form that errors have; ``message`` must not hold paths or the client's values."""
    return json_response({"error": message}, status)


def create_app(frame: Frame, log: Log) -> flask.Flask:
    """A Flask application without routes that answers in ``frame``, errors as JSON."""
    app = flask.Flask("model_server", static_folder=None)
    app.config["PROVIDE_AUTOMATIC_OPTIONS"] = False
    # Both would answer with a redirection, which no client of an API expects.
    app.url_map.merge_slashes = False
    app.url_map.strict_slashes = True

    @app.before_request
    def begin() -> flask.Response | None:
        _begin(frame)
        headers = flask.request.headers
        if flask.request.method != "OPTIONS" or "Access-Control-Request-Method" not in headers:
            return None
        # A browser asks before it sends JSON; whether it may is in the headers that all answers get.
        answer = flask.Response(status=204)
        if frame.may_read(headers.get("Origin")):
            answer.headers["Access-Control-Allow-Methods"] = "GET, POST, PUT, OPTIONS"
            answer.headers["Access-Control-Allow-Headers"] = headers.get("Access-Control-Request-Headers", "*")
            answer.headers["Access-Control-Max-Age"] = "600"
        return answer

    @app.after_request
    def finish(response: flask.Response) -> flask.Response:
        # A request that werkzeug refuses early never gets to `begin`.
        if "request_id" not in flask.g:
            _begin(frame)
        response.headers.extend(frame.headers(flask.g.request_id))
        response.headers.extend(frame.cors_headers(flask.request.headers.get("Origin")))
        request = flask.request
        rule = request.url_rule.rule if request.url_rule is not None else "other"
        frame.record(flask.g.request_id, request.method, request.path, rule, response.status_code, flask.g.started)
        return response

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> flask.Response:
        response = error_response((error.name or "error").lower(), error.code or 500)
        if (allowed := getattr(error, "valid_methods", None)) is not None:
            response.headers["Allow"] = ", ".join(sorted(allowed))
        return response

    @app.errorhandler(Exception)
    def unexpected(error: Exception) -> flask.Response:
        log.failure("internal_error", "the service itself failed", error, request_id=flask.g.get("request_id"))
        return error_response("internal error", 500)

    return app


def _begin(frame: Frame) -> None:
    flask.g.started = time.perf_counter()
    flask.g.request_id = frame.request_id(flask.request.headers.get("X-Request-ID"))


class _Task(WSGITask):
    def build_response_header(self) -> bytes:
        # A client with a busy connection would keep the drain from ever ending.
        if self.channel.server.draining:
            self.set_close_on_finish()
        return super().build_response_header()


class _JsonErrorTask(ErrorTask):
    """waitress's answer to what it can't parse, in the service's own form."""

    def execute(self) -> None:
        frame, error = self.channel.server.frame, self.request.error
        started = time.perf_counter()
        request_id = frame.request_id(self.request.headers.get("X_REQUEST_ID"))
        body = json.dumps({"error": error.reason.lower()}).encode()
        self.status = f"{error.code} {error.reason}"
        self.response_headers += [("Content-Type", "application/json"), *frame.headers(request_id)]
        if isinstance(error, Overloaded):
            self.response_headers.append(("Retry-After", "1"))
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)
        # What couldn't be parsed has no method and path worth the name.
        method = getattr(self.request, "command", "") or "other"
        path = getattr(self.request, "path", "") or "other"
        frame.record(request_id, method, path, "other", error.code, started)


class Channel(HTTPChannel):
    task_class = _Task
    error_task_class = _JsonErrorTask

    def __init__(self, server: Any, *arguments: Any, **options: Any) -> None:
        self.parser_class = server.parser_class
        super().__init__(server, *arguments, **options)

    def handle_close(self) -> None:
        """Called by waitress."""
        super().handle_close()
        # Complete requests are closed by who answers them; this one never gets there.
        if self.request is not None:
            self.request.close()

    def answer(self, data: bytes, close: bool) -> None:
        """Send the whole answer to the oldest request of this connection, and go on with the next one.

        For the loop's thread alone. A client that has gone away gets nothing, and nobody minds.
        """
        request = self.requests[0]
        if self.connected:
            # Mostly the kernel takes all of it at once, and waitress's buffers aren't needed.
            sent = 0 if self.total_outbufs_len else self.send(data, do_close=False)
            if sent < len(data):
                with contextlib.suppress(ClientDisconnected):
                    self.write_soon(data[sent:] if sent else data)
        request.close()
        self.last_activity = time.time()
        with self.requests_lock:
            if close or not self.connected:
                self.close_when_flushed = True
                for other in self.requests[1:]:
                    other.close()
                self.requests = []
                return
            self.requests.pop(0)
            if self.requests:
                self.server.add_task(self)
                return
            following = self.request
            if following and following.expect_continue and following.headers_finished and not self.sent_continue:
                self.send_continue()


class _Turn:
    """waitress's dispatcher of tasks: those of one turn of the loop together, and Flask's to threads.

    ``add_task`` is called under a lock of the channel, so it only takes note.
    """

    def __init__(self, threads: int) -> None:
        self._threads = ThreadedTaskDispatcher()
        self._threads.set_thread_count(threads)
        self.add_to_threads = self._threads.add_task
        # Threads add to it too, where a request follows one of theirs on its connection.
        self.channels: deque[Channel] = deque()
        # Without predictions there's nothing to gather.
        self.add_task = self.add_to_threads

    def gather(self) -> None:
        """From now on, hand every channel to the loop first."""
        self.add_task = self.channels.append

    def shutdown(self, cancel_pending: bool = True, timeout: int = 5) -> bool:
        """Called by waitress."""
        return self._threads.shutdown(cancel_pending, timeout)


class Server:
    """waitress on inherited sockets, with a drain that loses nothing.

    To be made after the fork, since waitress starts its threads at once. ``threads`` requests of ``app`` are worked on
    at a time; waitress queues what is beyond that, without a bound. Bodies above ``max_body_bytes`` are the
    application's to refuse; up to twice that is read, so that the client gets to see the answer. ``predict`` is called
    after each turn of the loop with the channels that have a request, and returns those that are for ``app``.
    """

    def __init__(
        self,
        app: flask.Flask,
        frame: Frame,
        listeners: Sequence[socket.socket],
        threads: int,
        max_body_bytes: int,
        predict: Callable[[list[Channel]], list[Channel]] | None = None,
    ) -> None:
        self._stopping = False
        self._predict = predict
        self._turn = _Turn(threads)
        self._map: dict[int, Any] = {}
        room = Room()
        self._servers = [
            create_server(
                app,
                map=self._map,
                _dispatcher=self._turn,
                sockets=[listener],
                ident=None,
                channel_timeout=_CHANNEL_SECONDS,
                asyncore_use_poll=True,
                connection_limit=_CONNECTION_LIMIT,
                recv_bytes=65536,
                max_request_body_size=2 * max_body_bytes,
                outbuf_overflow=_NO_LIMIT,
                # Only threads may wait until a client has taken what was written, and most answers come from the loop.
                outbuf_high_watermark=_NO_LIMIT,
                # So that a client which goes away is noticed while its request waits.
                channel_request_lookahead=1,
                # Nothing here looks at proxy headers.
                clear_untrusted_proxy_headers=False,
            )
            for listener in listeners
        ]
        for server in self._servers:
            server.channel_class = Channel
            server.parser_class = functools.partial(Parser, room)
            server.draining = False
            server.frame = frame
            if predict is not None:
                self._turn.gather()
                # waitress keeps the method itself.
                server.add_task = self._turn.add_task

    @property
    def draining(self) -> bool:
        """Whether answers are to close their connections."""
        return self._servers[0].draining

    def stop(self, *_: object) -> None:
        """End ``run``. May be called from a signal handler."""
        self._stopping = True
        self.wake()

    def wake(self) -> None:
        """Have the loop make a turn now. May be called from any thread."""
        self._servers[0].pull_trigger()

    def run(self, drain_seconds: float, beat: Callable[[], None] = lambda: None) -> bool:
        """Serve until ``stop``, then finish what was accepted; False where ``drain_seconds`` were too few.

        ``beat`` is called every TURN_SECONDS at least while it serves.
        """
        while not self._stopping:
            beat()
            self._make_turn(TURN_SECONDS)
        now = time.monotonic()
        deadline, linger = now + drain_seconds, now + min(_LINGER_SECONDS, drain_seconds)
        for server in self._servers:
            server.draining = True
            _accept_the_rest(server)
        while True:
            beat()
            self._make_turn(0.02)
            now = time.monotonic()
            if now >= linger and not self._busy():
                return True
            if now >= deadline:
                return False

    def _make_turn(self, seconds: float) -> None:
        # What is left of the last turn are requests that were sent ahead on a connection.
        wasyncore.poll2(0.0 if self._turn.channels else seconds, self._map)
        if self._predict is None:
            return
        waiting = self._turn.channels
        for channel in self._predict([waiting.popleft() for _ in range(len(waiting))]):
            self._turn.add_to_threads(channel)

    def _busy(self) -> bool:
        return any(
            channel.requests or channel.request is not None or channel.total_outbufs_len
            for server in self._servers
            for channel in server.active_channels.values()
        )


def _accept_the_rest(server: Any) -> None:
    """Take the connections that the kernel has completed already, and close the listening socket."""
    waiting = select.poll()
    waiting.register(server.socket, select.POLLIN)
    # Not for ever where clients keep coming on a socket that other processes share.
    for _ in range(_CONNECTION_LIMIT):
        if not waiting.poll(0):
            break
        server.handle_accept()
    # The server's own close would also close the pipe that wakes the loop.
    wasyncore.dispatcher.close(server)
