"""KServe's first protocol: ``{"instances": […]}`` is answered with ``{"predictions": […]}``."""

from collections.abc import Callable, Mapping

import flask

from model_server import payload
from model_server.core import Call, Models, Reply, Request, Route
from model_server.protocols.operations import (
    Operation,
    example_of,
    json_content,
    list_of,
    record,
    row_schema,
    value_schema,
)
from model_server.web import json_response

_TAG = "KServe"


def routes(models: Models) -> list[Route]:
    """The route that predicts."""

    def predict(request: Request, path: Mapping[str, str]) -> Call:
        model = models.find(path["name"])
        instances = payload.document(request.body).get("instances")
        if type(instances) is not list:
            raise payload.BadRequest('the body must be an object with the list "instances"')
        rows = model.bundle.input.rows(instances, model.bundle.max_rows)
        if rows.single:
            raise payload.BadRequest("instances must be a list of rows, not one row")
        return Call(model, rows.values, lambda outputs: Reply(payload.to_json({"predictions": outputs})))

    return [Route("/v1/models/<name>:predict", predict)]


def blueprint(models: Models, is_ready: Callable[[], bool]) -> flask.Blueprint:
    """Whether a model is ready."""
    views = flask.Blueprint("kserve", __name__)

    @views.get("/v1/models/<name>")
    def status(name: str) -> flask.Response:
        model, answer = models.find(name), is_ready()
        return json_response({"name": model.name, "ready": answer}, 200 if answer else 503)

    return views


def operations(models: Models) -> list[Operation]:
    """Of these routes."""
    found = []
    for model in models.all:
        rows, values = example_of(model)
        if model.bundle.input.rows(rows, model.bundle.max_rows).single:
            rows, values = [rows], [values]
        body = json_content(record(instances=list_of(row_schema(model), model)), {"instances": rows})
        answer = json_content(record(predictions=list_of(value_schema(model), model)), {"predictions": values})
        status = json_content(record(name={"type": "string"}, ready={"type": "boolean"}))
        path, summary = f"/v1/models/{model.name}", f"Predict with {model.name}"
        found += [
            Operation("POST", f"{path}:predict", _TAG, summary, answer, body, predicts=True),
            Operation("GET", path, _TAG, f"Whether {model.name} is ready", status, unready=status),
        ]
    return found
