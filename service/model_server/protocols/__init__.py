"""What clients may speak: each protocol is a module with its routes, over the one core."""

from collections.abc import Callable, Sequence

import flask

from model_server.core import Models, Route
from model_server.protocols import docs, jobs, kserve, named, native, oip, openapi, torchserve
from model_server.state import SharedState

_PROTOCOLS = (named, oip, torchserve, kserve)


def prediction_routes(models: Models) -> Sequence[Route]:
    """The routes that predict, of all protocols."""
    return [route for protocol in (native, *_PROTOCOLS) for route in protocol.routes(models)]


def blueprints(
    models: Models, state: SharedState, is_ready: Callable[[], bool], has_jobs: bool
) -> Sequence[flask.Blueprint]:
    """All other routes, but those of jobs, which ``jobs`` has; ``has_jobs`` says whether the document holds them.

    ``is_ready`` says whether the service can predict.
    """
    described = (*_PROTOCOLS, jobs) if has_jobs else _PROTOCOLS
    operations = [operation for protocol in described for operation in protocol.operations(models)]
    return [
        named.blueprint(models, is_ready),
        oip.blueprint(models, is_ready),
        torchserve.blueprint(models, is_ready, state),
        kserve.blueprint(models, is_ready),
        openapi.blueprint(models, operations),
        docs.blueprint(models),
    ]
