"""A worker: one loop that serves HTTP and runs quick models, and one thread for slow ones."""

import functools
import os
import signal
import socket
import threading
from collections.abc import Sequence

import flask

from model_server import loading
from model_server.bundle import Bundle
from model_server.config import Config
from model_server.control import create_blueprint, health
from model_server.core import Models, Refusal, Route
from model_server.executor import Executor
from model_server.features import Features
from model_server.logs import Log
from model_server.metrics import Metrics
from model_server.predictions import Predictions
from model_server.protocols import blueprints, jobs, prediction_routes
from model_server.state import SharedState
from model_server.web import Frame, Server, create_app, error_response

_PROBE_SECONDS = 30.0
# For everything but predictions.
_THREADS = 2


def create_worker_app(frame: Frame, log: Log, routes: Sequence[Route]) -> flask.Flask:
    """The application for every request that isn't for a route that predicts."""
    app = create_app(frame, log)
    for route in routes:
        # Never reached with the right method; Flask is to know what to say to the others.
        app.add_url_rule(route.rule, route.rule, _unreachable, methods=[route.method])

    @app.errorhandler(Refusal)
    def refused(refusal: Refusal) -> flask.Response:
        response = error_response(refusal.message, refusal.status)
        response.headers.extend(refusal.headers)
        return response

    return app


def run_worker(
    index: int,
    listeners: Sequence[socket.socket],
    models: Models,
    config: Config,
    bundle: Bundle,
    metrics: Metrics,
    metrics_directory: str,
    state: SharedState,
    log: Log,
) -> None:
    """Serve predictions on ``listeners`` until SIGTERM; return when accepted requests are answered.

    Raises RuntimeError where a model doesn't answer in this process.
    """
    prove(models)
    threading.excepthook = functools.partial(_end, log)
    routes = prediction_routes(models)
    frame = Frame(config, bundle, metrics, log)
    executor = Executor(models, config.queue_limit, metrics, functools.partial(state.set_busy, index))
    features = Features(bundle.models)
    predictions = Predictions(routes, executor, frame, metrics, features, log, config.max_body_bytes)
    app = create_worker_app(frame, log, routes)
    app.register_blueprint(create_blueprint(config, bundle, state, metrics_directory))
    has_jobs = config.jobs is not None
    for blueprint in blueprints(models, state, lambda: health(config, bundle, state)[1] == 200, has_jobs):
        app.register_blueprint(blueprint)
    app.register_blueprint(jobs.create_blueprint(models, config, metrics, log))
    server = Server(app, frame, listeners, _THREADS, config.max_body_bytes, predictions)
    executor.wake = server.wake
    signal.signal(signal.SIGTERM, server.stop)
    state.set_ready(index)
    log.info("worker_ready", f"worker {index} is ready", worker=index)
    in_time = server.run(config.drain_seconds, functools.partial(state.beat, index))
    features.fold()
    if not in_time:
        log.warning("drain_incomplete", f"requests were cut off after {config.drain_seconds} s", worker=index)


def _end(log: Log, failure: threading.ExceptHookArgs) -> None:
    """The end of a worker that lost a thread: some requests would wait for ever, and a replacement has none of them."""
    log.failure("thread_failed", "a thread of the worker failed", failure.exc_value or SystemExit())
    os._exit(1)


def _unreachable(**_: str) -> flask.Response:
    raise RuntimeError("a request for a prediction came to Flask")


def prove(models: Models) -> None:
    """One prediction of each model in a thread that may hang, as a model does that was forked at the wrong moment.

    Raises RuntimeError.
    """
    failures: list[BaseException] = []

    def run() -> None:
        try:
            loading.to_device(models)
            loading.probe(models)
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(_PROBE_SECONDS)
    if thread.is_alive():
        raise RuntimeError(f"the model didn't answer within {_PROBE_SECONDS:g} s in a forked process")
    if failures:
        raise RuntimeError("the model failed in a forked process") from failures[0]
