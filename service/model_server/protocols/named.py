"""The routes with a version in their path, and those that only say whether the service is there.

They take and answer the same bodies as ``POST /predict``.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import flask

from model_server.core import Models, Route
from model_server.protocols import native
from model_server.protocols.operations import (
    Operation,
    example_of,
    file_content,
    form_content,
    json_content,
    one_or_list,
    record,
    row_schema,
    value_schema,
)
from model_server.web import json_response

if TYPE_CHECKING:
    from model_server.model import Model


def routes(models: Models) -> list[Route]:
    """The routes that predict."""
    return native.predicting(models, ["/", "/v1beta1/predict", "/v1/predict", "/v1/model/<name>/predict"])


def blueprint(models: Models, is_ready: Callable[[], bool]) -> flask.Blueprint:
    """What is known about the service and its models."""
    views = flask.Blueprint("named", __name__)

    @views.get("/")
    def index() -> flask.Response:
        served = [{"name": model.name, "version": model.version} for model in models.all]
        return json_response({"models": served, "docs": "docs", "openapi": "openapi.json"})

    @views.get("/ok")
    def ok() -> flask.Response:
        return json_response({"status": "ok"})

    @views.get("/v1/live")
    def live() -> flask.Response:
        return json_response({"live": True})

    @views.get("/v1/ready")
    def ready() -> flask.Response:
        answer = is_ready()
        return json_response({"ready": answer}, 200 if answer else 503)

    @views.get("/v1/model/<name>/bio")
    def bio(name: str) -> flask.Response:
        return json_response(describe(models.find(name)))

    return views


def describe(model: "Model") -> dict[str, Any]:
    """What the manifest says about a model."""
    bundle = model.bundle
    return {
        "name": model.name,
        "version": model.version,
        "description": bundle.description,
        "bundle_digest": bundle.digest,
        "input": {"kind": bundle.input.kind, "description": bundle.input.describe(), "schema": bundle.input.schema()},
        "output": {"kind": bundle.output.kind, "labels": list(bundle.output.labels), "schema": value_schema(model)},
        "max_rows": bundle.max_rows,
        "metrics": bundle.metrics,
    }


def operations(models: Models) -> list[Operation]:
    """Of these routes, of ``/predict``, and of health and metrics."""
    default = models.default
    is_live = json_content(record(live={"type": "boolean"}), {"live": True})
    readiness = json_content(record(ready={"type": "boolean"}))
    text = {"text/plain": {"schema": {"type": "string"}}}
    index = record(models={"type": "array", "items": {"type": "object"}}, docs=_TEXT, openapi=_TEXT)
    health = json_content(record(status=_TEXT, model=_TEXT, version=_TEXT))
    return [
        *(_prediction(path, default) for path in ("/predict", "/v1/predict", "/v1beta1/predict", "/")),
        *(_prediction(f"/v1/model/{model.name}/predict", model) for model in models.all),
        *(
            Operation(
                "GET",
                f"/v1/model/{model.name}/bio",
                "Models",
                f"What {model.name} is",
                json_content(record(name=_TEXT, version=_TEXT), describe(model)),
            )
            for model in models.all
        ),
        Operation("GET", "/", "Service", "What is served, and where its documents are", json_content(index)),
        Operation("GET", "/ok", "Service", "Whether the service is there", json_content(record(status=_TEXT))),
        Operation("GET", "/v1/live", "Service", "Whether the service is alive", is_live),
        Operation("GET", "/v1/ready", "Service", "Whether it can predict", readiness, unready=readiness),
        Operation("GET", "/health", "Service", "Its state, in detail", health, unready=health),
        Operation("GET", "/metrics", "Service", "Metrics in Prometheus's text format", text),
    ]


_TEXT = {"type": "string"}


def _prediction(path: str, model: "Model") -> Operation:
    rows, output = example_of(model)
    body = json_content(record(data=one_or_list(row_schema(model), model)), {"data": rows})
    if model.bundle.input.kind == "image":
        body |= file_content() | form_content("file")
    answer = json_content(record(output=one_or_list(value_schema(model), model)), {"output": output})
    return Operation("POST", path, "Predictions", f"Predict with {model.name}", answer, body, predicts=True)
