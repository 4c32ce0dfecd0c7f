"""TorchServe's inference routes.

A body is the row itself, an answer the model's output itself, in the form that TorchServe's own handlers give it. Where
TorchServe leaves what a body means to a model's handler, the manifest's input decides here.
"""

import json
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import flask
import orjson

from model_server import payload
from model_server.core import Call, Models, Refusal, Reply, Request, Route
from model_server.protocols import forms
from model_server.protocols.operations import (
    Operation,
    example_of,
    file_content,
    form_content,
    json_content,
    one_or_list,
    record,
    row_schema,
)
from model_server.state import SharedState
from model_server.web import json_response

if TYPE_CHECKING:
    from model_server.model import Model

_FIELDS = ("data", "body")
_METHODS = ("POST", "PUT")
_TAG = "TorchServe"
# The names that TorchServe has for what went wrong.
_TYPES = {
    400: "BadRequestException",
    404: "ModelNotFoundException",
    413: "RequestEntityTooLargeException",
    503: "ServiceUnavailableException",
}


def error_body(status: int, message: str) -> bytes:
    """An error in TorchServe's form."""
    return json.dumps(_error(status, message)).encode()


def routes(models: Models) -> list[Route]:
    """The routes that predict."""

    def predict(request: Request, path: Mapping[str, str]) -> Call:
        model = models.find(path["name"], path.get("version"))
        rows = _rows(request, model)
        return Call(
            model,
            rows.values,
            lambda outputs: Reply(payload.to_json(_answer(model, outputs, rows.single))),
        )

    # TorchServe doesn't mind the method, and `curl -T FILE`, which its own documents show, makes it PUT.
    return [
        Route(rule, predict, method=method, error=error_body)
        for method in _METHODS
        for rule in ("/predictions/<name>", "/predictions/<name>/<version>")
    ]


def blueprint(models: Models, is_ready: Callable[[], bool], state: SharedState) -> flask.Blueprint:
    """Health and the list of models."""
    views = flask.Blueprint("torchserve", __name__)

    @views.errorhandler(Refusal)
    def refuse(refusal: Refusal) -> flask.Response:
        return json_response(_error(refusal.status, refusal.message), refusal.status)

    @views.get("/ping")
    def ping() -> flask.Response:
        return json_response({"status": "Healthy"}) if is_ready() else json_response({"status": "Unhealthy"}, 503)

    @views.get("/models")
    def list_models() -> flask.Response:
        listed = [{"modelName": model.name, "modelUrl": f"{model.name}/{model.version}"} for model in models.all]
        return json_response({"models": listed})

    @views.get("/models/<name>")
    @views.get("/models/<name>/<version>")
    def describe_model(name: str, version: str | None = None) -> flask.Response:
        return json_response([_describe(models.find(name, version), state)])

    return views


def _error(status: int, message: str) -> dict[str, Any]:
    return {"code": status, "type": _TYPES.get(status, "InternalServerException"), "message": message}


def _describe(model: "Model", state: SharedState) -> dict[str, Any]:
    bundle = model.bundle
    return {
        "modelName": model.name,
        "modelVersion": model.version,
        "modelUrl": f"{model.name}/{model.version}",
        "runtime": "python",
        "minWorkers": state.wanted,
        "maxWorkers": state.wanted,
        "batchSize": bundle.max_batch_rows,
        "maxBatchDelay": bundle.max_delay_ms,
        "loadedAtStartup": True,
        "workers": [{"id": str(number), "status": "READY"} for number in range(state.ready)],
    }


def _answer(model: "Model", outputs: list[Any], single: bool) -> Any:
    """Outputs in the form that TorchServe's own handlers give them; those of other code are left as they are."""
    spec = model.bundle.output
    if not hasattr(model.module, "postprocess"):
        if spec.kind == "classes":
            outputs = [{one["class"]: one["probability"] for one in output["top"]} for output in outputs]
        # Elsewhere such a row is answered with the number itself.
        elif spec.kind == "tensor" and spec.shape == (1,):
            outputs = [[output] for output in outputs]
    return outputs[0] if single else outputs


def _value_schema(model: "Model") -> dict[str, Any]:
    """The schema of what one row is answered with."""
    spec = model.bundle.output
    if hasattr(model.module, "postprocess"):
        return {}
    if spec.kind == "classes":
        chances = {"type": "object", "additionalProperties": {"type": "number"}}
        return {**chances, "minProperties": spec.top, "maxProperties": spec.top}
    return spec.schema()


def _rows(request: Request, model: "Model") -> payload.Rows:
    """The rows that a body is, or that a field of a form has. Raises BadRequest."""
    content_type, options = forms.content_type(request)
    is_form = content_type == forms.FORM
    bodies = _field(forms.read(request.body, options, model.bundle.max_rows)) if is_form else [request.body]
    body, kind = bodies[0], model.bundle.input.kind
    if not all(bodies):
        raise payload.BadRequest("the body is empty")
    # No image begins like JSON, so that nothing depends on a content type, which few clients set with care.
    if kind == "bytes" or (kind == "image" and body.lstrip()[:1] not in (b"{", b"[", b'"')):
        payload.check_count(len(bodies), model.bundle.max_rows)
        return payload.Rows(bodies, single=len(bodies) == 1)
    if len(bodies) > 1:
        raise payload.BadRequest("the form has the field several times; send one, with a list of rows")
    try:
        data = orjson.loads(body)
    except ValueError:
        raise payload.BadRequest("the body is not JSON") from None
    if type(data) is dict:
        member = "instances" if "instances" in data else "data"
        if member not in data:
            raise payload.BadRequest('the body must be a row, a list of rows, or an object with "instances" or "data"')
        data = data[member]
    return model.bundle.input.rows(data, model.bundle.max_rows)


def _field(form: forms.Form) -> list[bytes]:
    """What the field ``data`` or ``body`` of a form has, be it a file or not, each time it comes. Raises BadRequest."""
    for name in _FIELDS:
        for parts in (form.files, form.texts):
            if found := [value for field, value in parts if field == name]:
                return found
    raise payload.BadRequest('the form has no field "data" or "body"')


def operations(models: Models) -> list[Operation]:
    """Of these routes."""
    text = {"type": "string"}
    ping = json_content(record(status=text))
    listed = json_content(record(models={"type": "array", "items": record(modelName=text, modelUrl=text)}))
    described = json_content({"type": "array", "items": record(modelName=text, modelVersion=text)})
    found = [
        Operation("GET", "/ping", _TAG, "Whether every model can predict", ping, unready=ping),
        Operation("GET", "/models", _TAG, "The models", listed),
    ]
    for model in models.all:
        for name in (model.name, f"{model.name}/{model.version}"):
            found += [
                *(_prediction(method, f"/predictions/{name}", model) for method in _METHODS),
                Operation("GET", f"/models/{name}", _TAG, f"How {model.name} is served", described),
            ]
    return found


def _prediction(method: str, path: str, model: "Model") -> Operation:
    rows, output = example_of(model)
    single = model.bundle.input.rows(rows, model.bundle.max_rows).single
    output = _answer(model, [output] if single else output, single)
    if model.bundle.input.kind == "tensor":
        body = json_content(one_or_list(row_schema(model), model), rows)
    else:
        body = file_content()
    answer = json_content(one_or_list(_value_schema(model), model), output)
    summary = f"Predict with {model.name}; the body is the row itself"
    return Operation(
        method, path, _TAG, summary, answer, body | form_content("data"), predicts=True, error="TorchServeError"
    )
