"""What the worker's and the control process's HTTP side have in common."""

import json
import os
import re
import select
import socket
import time
from collections.abc import Callable
from typing import Any

import flask
from waitress import wasyncore
from waitress.channel import HTTPChannel
from waitress.server import create_server
from waitress.task import ErrorTask, WSGITask
from werkzeug.exceptions import HTTPException

from model_server.bundle import Bundle
from model_server.config import Config
from model_server.logs import Log
from model_server.metrics import Metrics

_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
# Longer than the minute for which nginx keeps idle connections, so that nginx is always the one to close them.
_CHANNEL_SECONDS = 120
# How often waitress gets to look for idle connections.
TURN_SECONDS = 5.0
# What is longer is cut in the log: both come from the client, and a line must stay a line.
_LOGGED_METHOD, _LOGGED_PATH = 20, 200
# How long idle connections stay open at the end, for requests that were under way on them.
_LINGER_SECONDS = 0.25


class Frame:
    """What every answer has in common: its headers, its log line and its place in the metrics.

    With ``quiet`` only errors are logged: scrapes every few seconds would bury the predictions.
    """

    def __init__(
        self,
        config: Config,
        bundle: Bundle,
        metrics: Metrics,
        log: Log,
        routes: frozenset[str],
        *,
        quiet: bool = False,
    ) -> None:
        self._metrics = metrics
        self._log = log
        self._routes = routes
        self._quiet = quiet
        self._headers = (("X-Model-Colour", config.colour), ("X-Model-Version", bundle.version))

    def request_id(self, given: str | None) -> str:
        """The caller's identifier where it is acceptable, else a new one."""
        if given is not None and _REQUEST_ID.fullmatch(given):
            return given
        return os.urandom(16).hex()

    def headers(self, request_id: str) -> tuple[tuple[str, str], ...]:
        """The headers of an answer."""
        return (("X-Request-ID", request_id), *self._headers)

    def record(self, request_id: str, method: str, path: str, status: int, started: float) -> None:
        """Count and log an answer; ``started`` is of ``time.perf_counter``."""
        self._metrics.count_request(method, path if path in self._routes else "other", status)
        if self._quiet and status < 400:
            return
        method, path = method[:_LOGGED_METHOD], path[:_LOGGED_PATH]
        self._log.info(
            "request",
            f"{method} {path} {status}",
            request_id=request_id,
            method=method,
            path=path,
            status=status,
            duration_ms=round((time.perf_counter() - started) * 1000, 3),
        )


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
    def begin() -> None:
        _begin(frame)

    @app.after_request
    def finish(response: flask.Response) -> flask.Response:
        # A request that werkzeug refuses early never gets to `begin`.
        if "request_id" not in flask.g:
            _begin(frame)
        response.headers.extend(frame.headers(flask.g.request_id))
        request = flask.request
        frame.record(flask.g.request_id, request.method, request.path, response.status_code, flask.g.started)
        return response

    @app.errorhandler(HTTPException)
    def http_error(error: HTTPException) -> flask.Response:
        response = error_response((error.name or "error").lower(), error.code or 500)
        if (allowed := getattr(error, "valid_methods", None)) is not None:
            response.headers["Allow"] = ", ".join(sorted(allowed))
        return response

    @app.errorhandler(Exception)
    def unexpected(error: Exception) -> flask.Response:
        log.error("internal_error", "the service itself failed", error, request_id=flask.g.get("request_id"))
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
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)
        # What couldn't be parsed has no method and path worth the name.
        method = getattr(self.request, "command", "") or "other"
        path = getattr(self.request, "path", "") or "other"
        frame.record(request_id, method, path, error.code, started)


class _Channel(HTTPChannel):
    task_class = _Task
    error_task_class = _JsonErrorTask


class Server:
    """waitress on an inherited socket, with a drain that loses nothing.

    To be made after the fork, since waitress starts its threads at once. ``threads`` requests are worked on at a time;
    waitress queues what is beyond that, without a bound. Bodies above ``max_body_bytes`` are the application's to
    refuse; up to twice that is read, so that the client gets to see the answer.
    """

    def __init__(
        self, app: flask.Flask, frame: Frame, listener: socket.socket, threads: int, max_body_bytes: int
    ) -> None:
        self._stopping = False
        self._server = create_server(
            app,
            sockets=[listener],
            threads=threads,
            ident=None,
            channel_timeout=_CHANNEL_SECONDS,
            asyncore_use_poll=True,
            connection_limit=1000,
            recv_bytes=65536,
            max_request_body_size=2 * max_body_bytes,
            # Bodies stay in memory: their size is bounded, and there may be no disk to write to.
            inbuf_overflow=2 * max_body_bytes + 1,
            # Nothing here looks at proxy headers.
            clear_untrusted_proxy_headers=False,
        )
        self._server.channel_class = _Channel
        self._server.draining = False
        self._server.frame = frame

    def stop(self, *_: object) -> None:
        """End ``run``. May be called from a signal handler."""
        self._stopping = True
        self._server.pull_trigger()

    def run(self, drain_seconds: float, beat: Callable[[], None] = lambda: None) -> bool:
        """Serve until ``stop``, then finish what was accepted; False where ``drain_seconds`` were too few.

        ``beat`` is called every TURN_SECONDS at least while it serves.
        """
        connections = self._server._map
        while not self._stopping:
            beat()
            wasyncore.poll2(TURN_SECONDS, connections)
        now = time.monotonic()
        deadline, linger = now + drain_seconds, now + min(_LINGER_SECONDS, drain_seconds)
        self._server.draining = True
        self._accept_the_rest()
        while True:
            wasyncore.poll2(0.02, connections)
            now = time.monotonic()
            if now >= linger and not self._busy():
                return True
            if now >= deadline:
                return False

    def _accept_the_rest(self) -> None:
        """Take the connections that the kernel has completed already, and close the listening socket."""
        waiting = select.poll()
        waiting.register(self._server.socket, select.POLLIN)
        while waiting.poll(0):
            self._server.handle_accept()
        # The server's own close would also close the pipe that wakes the loop.
        wasyncore.dispatcher.close(self._server)

    def _busy(self) -> bool:
        return any(
            channel.requests or channel.request is not None or channel.total_outbufs_len
            for channel in self._server.active_channels.values()
        )
