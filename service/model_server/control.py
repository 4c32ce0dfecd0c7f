"""The control process: health and metrics, answered also while every worker is busy."""

import signal
import socket
from typing import Any

import flask

from model_server.bundle import Bundle
from model_server.config import Config
from model_server.logs import Log
from model_server.metrics import Exporter, Metrics
from model_server.state import Phase, SharedState
from model_server.web import Frame, Server, create_app, json_response

_THREADS = 4


def health(config: Config, bundle: Bundle, state: SharedState) -> tuple[dict[str, Any], int]:
    """The document that ``GET /health`` answers, and its HTTP status."""
    wanted, ready, phase = state.wanted, state.ready, state.phase
    if phase is Phase.DRAINING:
        status, reason, code = "draining", "the service is stopping", 503
    elif phase is Phase.STARTING:
        status, reason, code = "starting", "the model is being loaded", 503
    elif ready == 0:
        status, reason, code = "unavailable", "no worker is running", 503
    elif ready < wanted:
        status, reason, code = "degraded", f"{wanted - ready} of {wanted} workers are missing", 200
    else:
        status, reason, code = "ready", None, 200
    document = {
        "status": status,
        "reason": reason,
        "colour": config.colour,
        "release": config.release,
        "model": bundle.name,
        "version": bundle.version,
        "bundle_digest": bundle.digest,
        "workers": {"wanted": wanted, "ready": ready, "restarts": state.restarts},
    }
    return document, code


def create_blueprint(config: Config, bundle: Bundle, state: SharedState, metrics_directory: str) -> flask.Blueprint:
    """``GET /health`` and ``GET /metrics``."""
    routes = flask.Blueprint("control", __name__)
    exporter = Exporter(metrics_directory, config, bundle, state)

    @routes.get("/health")
    def get_health() -> flask.Response:
        return json_response(*health(config, bundle, state))

    @routes.get("/metrics")
    def get_metrics() -> flask.Response:
        return flask.Response(exporter.text(), content_type="text/plain; version=0.0.4; charset=utf-8")

    return routes


def run_control(
    listener: socket.socket,
    config: Config,
    bundle: Bundle,
    metrics: Metrics,
    metrics_directory: str,
    state: SharedState,
    log: Log,
) -> None:
    """Serve health and metrics on ``listener`` until SIGTERM."""
    frame = Frame(config, bundle, metrics, log)
    app = create_app(frame, log)
    app.register_blueprint(create_blueprint(config, bundle, state, metrics_directory))
    server = Server(app, frame, [listener], _THREADS, config.max_body_bytes)
    signal.signal(signal.SIGTERM, server.stop)
    server.run(drain_seconds=1)
