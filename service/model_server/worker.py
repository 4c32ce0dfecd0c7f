"""A worker: HTTP threads that parse and wait, and one thread that runs the model."""

import functools
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import flask

from model_server import payload
from model_server.bundle import Bundle
from model_server.config import Config
from model_server.logs import Log
from model_server.metrics import Metrics
from model_server.model import Model, ModelFailed
from model_server.state import SharedState
from model_server.web import Frame, Server, create_app, error_response

ROUTES = frozenset(("/predict",))

_PROBE_SECONDS = 30.0
# Beyond the threads that wait for the model, so that there is always one to refuse a request at once.
_SPARE_THREADS = 4


class Overloaded(Exception):
    """As many requests as allowed are waiting for the model already."""


class _Job:
    __slots__ = ("done", "error", "outputs", "rows")

    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows
        self.outputs: list[Any] = []
        self.error: BaseException | None = None
        self.done = threading.Event()


class ModelThread:
    """The one thread that calls the model, behind a queue with room for ``limit`` waiting requests.

    ``busy`` is called with True and False around each prediction.
    """

    def __init__(self, model: Model, metrics: Metrics, limit: int, busy: Callable[[bool], None]) -> None:
        self._model = model
        self._metrics = metrics
        self._busy = busy
        self._jobs: queue.Queue[_Job] = queue.Queue(limit)
        threading.Thread(target=self._run, name="model", daemon=True).start()

    def predict(self, rows: list[Any]) -> list[Any]:
        """Wait for the model's outputs, one for each row. Raises Overloaded, ModelFailed."""
        job = _Job(rows)
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise Overloaded from None
        self._metrics.requests_in_progress.inc()
        job.done.wait()
        self._metrics.requests_in_progress.dec()
        if job.error is not None:
            raise ModelFailed("the model failed") from job.error
        return job.outputs

    def _run(self) -> None:
        while True:
            job = self._jobs.get()
            started = time.perf_counter()
            self._busy(True)
            try:
                job.outputs = self._model.predict(job.rows)
            # Whatever the model's code raises, the thread must live on and the client must get an answer.
            except BaseException as error:
                job.error = error
            self._busy(False)
            self._metrics.prediction_duration.observe(time.perf_counter() - started)
            job.done.set()


def create_worker_app(
    config: Config, bundle: Bundle, model: ModelThread, metrics: Metrics, log: Log, frame: Frame
) -> flask.Flask:
    """The application with the route ``POST /predict``."""
    app = create_app(frame, log)

    @app.post("/predict")
    def predict() -> flask.Response:
        length = flask.request.content_length or 0
        if length > config.max_body_bytes:
            return error_response(f"the body has {length} bytes; at most {config.max_body_bytes} are accepted", 413)
        # The bytes as they came: clients often leave out the Content-Type, and only one format is accepted anyway.
        body = flask.request.environ["wsgi.input"].read(length)
        try:
            rows = payload.parse(body, bundle.input, bundle.max_rows)
        except payload.BadRequest as error:
            return error_response(str(error), 400)
        try:
            answer = payload.render(model.predict(rows.values), rows.single)
        except Overloaded:
            response = error_response("too many requests are waiting; try again", 503)
            response.headers["Retry-After"] = "1"
            return response
        except payload.NotFinite as error:
            metrics.prediction_error.inc(len(rows.values))
            return error_response(str(error), 400)
        except (ModelFailed, payload.UnusableOutput) as error:
            metrics.prediction_error.inc(len(rows.values))
            log.error("prediction_failed", str(error), error, request_id=flask.g.request_id)
            return error_response("the model failed on this request", 500)
        metrics.prediction_ok.inc(len(rows.values))
        return flask.Response(answer, content_type="application/json")

    return app


def run_worker(
    index: int,
    listener: socket.socket,
    model: Model,
    config: Config,
    bundle: Bundle,
    metrics: Metrics,
    state: SharedState,
    log: Log,
) -> None:
    """Serve predictions on ``listener`` until SIGTERM; return when accepted requests are answered.

    Raises RuntimeError where the model doesn't answer in this process.
    """
    _prove(model)
    thread = ModelThread(model, metrics, config.queue_limit, functools.partial(state.set_busy, index))
    frame = Frame(config, bundle, metrics, log, ROUTES)
    app = create_worker_app(config, bundle, thread, metrics, log, frame)
    server = Server(app, frame, listener, config.queue_limit + 1 + _SPARE_THREADS, config.max_body_bytes)
    signal.signal(signal.SIGTERM, server.stop)
    state.set_ready(index)
    log.info("worker_ready", f"worker {index} is ready", worker=index)
    if not server.run(config.drain_seconds, functools.partial(state.beat, index)):
        log.warning("drain_incomplete", f"requests were cut off after {config.drain_seconds} s", worker=index)


def _prove(model: Model) -> None:
    """One prediction in a thread that may hang, as a model does that was forked at the wrong moment."""
    failures: list[BaseException] = []

    def probe() -> None:
        try:
            model.probe()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(_PROBE_SECONDS)
    if thread.is_alive():
        raise RuntimeError(f"the model didn't answer within {_PROBE_SECONDS:g} s in a forked process")
    if failures:
        raise RuntimeError("the model failed in a forked process") from failures[0]
