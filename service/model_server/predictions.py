"""Answering the requests that predict, from the server's loop."""

import functools
import json
import time
from collections.abc import Mapping, Sequence
from email.utils import formatdate
from http import HTTPStatus
from typing import Any

from model_server.core import Call, Refusal, Reply, Request, Route, client_seconds, plain_body
from model_server.errors import ModelFailed
from model_server.executor import Executor, overloaded
from model_server.failures import log_failure
from model_server.features import Features
from model_server.logs import Log
from model_server.metrics import Metrics, Tally
from model_server.model import Model
from model_server.payload import BadRequest, NotFinite, UnusableOutput
from model_server.receiving import Overloaded
from model_server.web import Channel, Frame

_NOTHING: Mapping[str, str] = {}
_CLOSE = b"Connection: close\r\n"
_KEEP_ALIVE = b"Connection: Keep-Alive\r\n"
_PHRASES = {status.value: status.phrase for status in HTTPStatus}
# The appliance's own requests carry it: their rows say nothing about what clients ask.
_PROBE = "X_APPLIANCE_PROBE"
# What nginx says there of the monitoring's probe alone, which needn't know what the live model takes.
_ASKS_FOR_EXAMPLE = "example"


class Predictions:
    """Answers the requests for the routes that predict, all those of one turn of the loop together."""

    def __init__(
        self,
        routes: Sequence[Route],
        executor: Executor,
        frame: Frame,
        metrics: Metrics,
        features: Features,
        log: Log,
        max_body_bytes: int,
    ) -> None:
        self._exact = {(route.method, route.rule): route for route in routes if route.pattern is None}
        self._patterns = [route for route in routes if route.pattern is not None]
        self._executor = executor
        self._frame = frame
        self._metrics = metrics
        self._features = features
        self._tally = Tally()
        self._log = log
        self._lines = log.gather()
        self._max_body_bytes = max_body_bytes
        self._example = json.dumps(executor.models[frame.model].bundle.examples[0].request).encode()
        self._second, self._second_text = 0, ""
        self._static_headers = "".join(f"{name}: {value}\r\n" for name, value in frame.static_headers).encode()

    def __call__(self, channels: list[Channel]) -> list[Channel]:
        """Begin what is asked on ``channels``, run quick models, finish what is done; the channels for others."""
        others = []
        for channel in channels:
            request = channel.requests[0]
            unparsed = request.error is not None and not isinstance(request.error, Overloaded)
            found = None if unparsed else self._find(request)
            if found is None:
                others.append(channel)
            else:
                self._begin(channel, request, *found)
        # Before a run too: a model that hangs in it is then seen at work.
        self._executor.show_load()
        self._executor.run_inline()
        self._executor.deliver()
        self._executor.show_load()
        self._tally.flush()
        self._features.turn()
        self._lines.flush()
        return others

    def _date(self) -> str:
        second = int(time.time())
        if second != self._second:
            self._second, self._second_text = second, formatdate(second, usegmt=True)
        return self._second_text

    def _find(self, request: Any) -> tuple[Route, Mapping[str, str]] | None:
        path = request.path
        # Flask gets such a path with one slash from waitress, and must not find what is found here.
        if path.startswith("//"):
            path = "/" + path.lstrip("/")
        route = self._exact.get((request.command, path))
        if route is not None:
            return route, _NOTHING
        for route in self._patterns:
            match = route.pattern.fullmatch(path)
            if match is not None and route.method == request.command:
                return route, match.groupdict()
        return None

    def _begin(self, channel: Channel, raw: Any, route: Route, groups: Mapping[str, str]) -> None:
        started = time.perf_counter()
        request_id = self._frame.request_id(raw.headers.get("X_REQUEST_ID"))
        try:
            if raw.error is not None:
                raise overloaded()
            body = plain_body(raw.body(), raw.headers.get("CONTENT_ENCODING"), self._max_body_bytes)
            if not body and raw.headers.get(_PROBE) == _ASKS_FOR_EXAMPLE:
                body = self._example
            waits = client_seconds(raw.headers)
            call = route.begin(Request(raw.command, raw.path, raw.headers, body), groups)
        except Exception as error:
            reply = self._as_reply(error, route, request_id)
            # A request that names no model, or one that isn't served, is the first one's.
            models = self._executor.models
            model = models.get(groups.get("name", ""), models[self._frame.model])
            self._reject(model, error)
            self._note_refused(groups.get("name"), raw, error)
            self._answer(channel, raw, route, request_id, started, reply, model)
            return
        if call.seconds is None:
            call.seconds = waits
        call.received, call.request_id, call.size = started, request_id, len(body)
        call.context = (channel, raw, route)
        call.finish = self._finish
        call.is_alive = functools.partial(getattr, channel, "connected")
        try:
            self._executor.submit(call)
        except Refusal as refusal:
            self._finish(call, refusal)

    def _finish(self, call: Call, result: Reply | Exception) -> None:
        channel, raw, route = call.context
        metrics = self._metrics.of(call.model.name)
        if isinstance(result, Reply):
            reply = result
            features = self._features.of(call.model.name)
            if features is not None and _PROBE not in raw.headers:
                features.add(call.rows)
            self._tally.count(metrics.ok, len(call.rows))
            seconds = time.perf_counter() - call.received
            self._tally.observe(metrics.request_duration, seconds)
            self._tally.observe(metrics.queue_wait, call.queue_seconds)
            self._tally.observe(metrics.handler_duration, max(0.0, seconds - call.queue_seconds - call.model_seconds))
        else:
            reply = self._as_reply(result, route, call.request_id)
            if isinstance(result, Refusal):
                self._reject(call.model, result, len(call.rows))
            else:
                self._tally.count(metrics.error, len(call.rows))
        self._answer(channel, raw, route, call.request_id, call.received, reply, call.model, call)

    def _reject(self, model: Model, error: Exception, rows: int = 1) -> None:
        # Nobody knows how many rows a request has that can't be read: it counts as one.
        reason = error.reason if isinstance(error, Refusal) else "invalid" if isinstance(error, BadRequest) else None
        if reason is not None:
            metrics = self._metrics.of(model.name)
            self._tally.count(metrics.rejected[reason])
            if reason in metrics.refused:
                self._tally.count(metrics.refused[reason], rows)

    def _note_refused(self, name: str | None, raw: Any, error: Exception) -> None:
        features = self._features.of(name or self._frame.model)
        column = error.column if isinstance(error, BadRequest) else None
        if features is not None and column is not None and _PROBE not in raw.headers:
            features.refuse(column, error.is_missing)

    def _as_reply(self, error: Exception, route: Route, request_id: str) -> Reply:
        # A request that fits, but for which the model has no answer that JSON can hold, is the client's to change too.
        if isinstance(error, NotFinite):
            # It counts among the model's errors, which are looked for in the log; any client may bring it about.
            self._log.warning("prediction_failed", str(error), request_id=request_id)
        if isinstance(error, BadRequest | NotFinite):
            error = Refusal(400, str(error))
        if isinstance(error, Refusal):
            return Reply(route.error(error.status, error.message), error.status, headers=error.headers)
        if isinstance(error, ModelFailed | UnusableOutput):
            log_failure(self._log, error, request_id=request_id)
            return Reply(route.error(500, "the model failed on this request"), 500)
        self._log.failure("internal_error", "the service itself failed", error, request_id=request_id)
        return Reply(route.error(500, "internal error"), 500)

    def _answer(
        self,
        channel: Channel,
        raw: Any,
        route: Route,
        request_id: str,
        started: float,
        reply: Reply,
        model: Model,
        call: Call | None = None,
    ) -> None:
        close = raw.connection_close or channel.server.draining
        # An HTTP/1.0 client that asked to keep the connection has to be told that it may.
        connection = _CLOSE if close else _KEEP_ALIVE if raw.version == "1.0" else b""
        head = (
            f"HTTP/1.1 {reply.status} {_PHRASES.get(reply.status, 'Error')}\r\nContent-Type: {reply.content_type}\r\n"
            f"Content-Length: {len(reply.body)}\r\nDate: {self._date()}\r\nX-Request-ID: {request_id}\r\n"
        ).encode("latin-1")
        origin = raw.headers.get("ORIGIN")
        for name, value in (*reply.headers, *(self._frame.cors_headers(origin) if origin else ())):
            head += f"{name}: {value}\r\n".encode("latin-1")
        channel.answer(b"".join((head, self._static_headers, connection, b"\r\n", reply.body)), close)
        self._tally.count(self._metrics.request_child(raw.command, route.rule, reply.status))
        self._frame.note(self._lines, request_id, raw.command, raw.path, reply.status, started, model, call)
