"""``GET /openapi.json``: what this colour serves, each model's routes with its own schemas and examples."""

import json
import re
from collections.abc import Sequence
from http import HTTPStatus
from typing import Any

import flask

from model_server.core import LONGEST_TIMEOUT_SECONDS, TIMEOUT_HEADER, Models
from model_server.protocols.operations import Operation, json_content, record

_PREDICTION_ERRORS = (400, 404, 413, 415, 500, 503, 504)
_STRING = {"type": "string"}
_SCHEMAS = {
    "Error": record(error=_STRING),
    "TorchServeError": record(code={"type": "integer"}, type=_STRING, message=_STRING),
}
_HEADERS = {
    "X-Request-ID": {"description": "The caller's, where it is acceptable, else a new one.", "schema": _STRING},
    "X-Model-Colour": {"description": "The colour that answered.", "schema": _STRING},
    "X-Model-Version": {"description": "The version of the bundle that answered.", "schema": _STRING},
}
_ALL_HEADERS = {name: {"$ref": f"#/components/headers/{name}"} for name in _HEADERS}
_RETRY_AFTER = {"description": "Seconds to wait.", "schema": {"type": "integer", "minimum": 0}}
_PARAMETERS = {
    "request_id": {
        "name": "X-Request-ID",
        "in": "header",
        "description": "Names the request in the logs and comes back, if it matches `^[A-Za-z0-9._-]{1,64}$`.",
        "schema": _STRING,
    },
    "timeout": {
        "name": TIMEOUT_HEADER,
        "in": "header",
        "description": "For how many seconds the caller waits; a request that would begin later is answered with 504.",
        "schema": {
            "type": "number",
            "minimum": 0,
            "exclusiveMinimum": True,
            "maximum": LONGEST_TIMEOUT_SECONDS,
        },
    },
}


def document(models: Models, operations: Sequence[Operation]) -> dict[str, Any]:
    """The OpenAPI document.

    Of version 3.0, as the page that shows it knows no later one.
    """
    default = models.default
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _described(operation)
    return _for_3_0(
        {
            "openapi": "3.0.3",
            "info": {
                "title": default.name,
                "version": default.version,
                "description": "\n\n".join(f"**{model.name}**: {model.bundle.description}" for model in models.all),
            },
            # Relative to this document, so that it is also right under the edge's prefix for the idle colour.
            "servers": [{"url": "."}],
            "paths": paths,
            "components": {"schemas": _SCHEMAS, "headers": _HEADERS, "parameters": _PARAMETERS},
        }
    )


def blueprint(models: Models, operations: Sequence[Operation]) -> flask.Blueprint:
    """The document, also where TorchServe has it."""
    views = flask.Blueprint("openapi", __name__)
    body = json.dumps(document(models, operations), ensure_ascii=False).encode()

    @views.get("/openapi.json")
    @views.route("/", methods=["OPTIONS"])
    def get_document() -> flask.Response:
        response = flask.Response(body, content_type="application/json")
        # The other colour may be at the same address the next time.
        response.headers["Cache-Control"] = "no-cache"
        return response

    return views


def _described(operation: Operation) -> dict[str, Any]:
    refusals, parameters = operation.refusals, list(operation.parameters)
    if operation.predicts and not refusals:
        refusals = _PREDICTION_ERRORS
        parameters = [{"$ref": f"#/components/parameters/{name}"} for name in _PARAMETERS]
    responses = {
        str(status): {
            "description": HTTPStatus(status).phrase,
            "headers": _ALL_HEADERS,
            "content": operation.answer,
        }
        for status in operation.statuses
    }
    responses |= {str(status): _error(status, operation.error) for status in refusals}
    if operation.unready is not None:
        responses["503"] = {"description": "Not ready", "headers": _ALL_HEADERS, "content": operation.unready}
    described: dict[str, Any] = {
        "tags": [operation.tag],
        "summary": operation.summary,
        # The page's link to an operation has this name in it, and works only where nothing in it is escaped.
        # A name's own _ mustn't look like a slash: x_ready is another model than x.
        "operationId": re.sub(r"[^A-Za-z0-9.-]", "_", operation.method.lower() + operation.path.replace("_", ".")),
        "responses": responses,
    }
    if parameters:
        described["parameters"] = parameters
    if operation.body is not None:
        described["requestBody"] = {"required": operation.predicts, "content": operation.body}
    return described


def _error(status: int, schema: str) -> dict[str, Any]:
    headers = {**_ALL_HEADERS, "Retry-After": _RETRY_AFTER} if status == 503 else _ALL_HEADERS
    content = json_content({"$ref": f"#/components/schemas/{schema}"})
    return {"description": HTTPStatus(status).phrase, "headers": headers, "content": content}


def _for_3_0(value: Any) -> Any:
    """Replace the one keyword in which the schemas of rows differ from that version's."""
    if isinstance(value, list):
        return [_for_3_0(part) for part in value]
    if not isinstance(value, dict):
        return value
    if value.get("contentEncoding") == "base64":
        value = {"format": "byte", **{key: part for key, part in value.items() if key != "contentEncoding"}}
    return {key: _for_3_0(part) for key, part in value.items()}
