"""The Open Inference Protocol v2 over REST, with the binary tensor data extension.

A model has one input tensor, ``input``, and one output tensor, ``output``; their first dimension counts rows.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import flask
import orjson

from model_server.core import LONGEST_TIMEOUT_SECONDS, Call, Models, Reply, Request, Route
from model_server.payload import BadRequest, to_json
from model_server.protocols import tensors
from model_server.protocols.operations import Operation, file_content, json_content, record
from model_server.web import json_response

if TYPE_CHECKING:
    from model_server.model import Model

HEADER_LENGTH = "Inference-Header-Content-Length"

_NAME = "model_server"
_EXTENSIONS = ["binary_tensor_data", "classification", "model_repository(index)"]
_TAG = "Open Inference Protocol"


@dataclass(frozen=True)
class _Wish:
    """How a client wants the output: as bytes or JSON; of a classifier, only its ``classes`` likeliest classes."""

    binary: bool = False
    classes: int | None = None


def routes(models: Models) -> list[Route]:
    """The routes that predict."""

    def infer(request: Request, path: Mapping[str, str]) -> Call:
        model = models.find(path["name"], path.get("version"))
        header, rest = _parts(request)
        wish = _wish(header, model)
        rows = tensors.read_input(_single_input(header), rest, model.bundle.input, model.bundle.max_rows)
        render = functools.partial(_render, model, header.get("id"), wish)
        return Call(model, rows, render, wants_tensor=_has_tensor(model), seconds=_seconds(header))

    return [Route("/v2/models/<name>/infer", infer), Route("/v2/models/<name>/versions/<version>/infer", infer)]


def blueprint(models: Models, is_ready: Callable[[], bool]) -> flask.Blueprint:
    """What is known about the server and its models, and whether they are ready."""
    views = flask.Blueprint("oip", __name__)

    @views.get("/v2")
    @views.get("/v2/")
    def server() -> flask.Response:
        return json_response({"name": _NAME, "version": models.default.version, "extensions": _EXTENSIONS})

    @views.get("/v2/health/live")
    def live() -> flask.Response:
        return json_response({"live": True})

    @views.get("/v2/health/ready")
    def ready() -> flask.Response:
        answer = is_ready()
        return json_response({"ready": answer}, 200 if answer else 503)

    @views.get("/v2/models/<name>")
    @views.get("/v2/models/<name>/versions/<version>")
    def metadata(name: str, version: str | None = None) -> flask.Response:
        return json_response(describe(models.find(name, version)))

    @views.get("/v2/models/<name>/ready")
    @views.get("/v2/models/<name>/versions/<version>/ready")
    def model_ready(name: str, version: str | None = None) -> flask.Response:
        model, answer = models.find(name, version), is_ready()
        return json_response({"name": model.name, "ready": answer}, 200 if answer else 503)

    @views.post("/v2/repository/index")
    def index() -> flask.Response:
        return json_response(
            [{"name": model.name, "version": model.version, "state": "READY", "reason": ""} for model in models.all]
        )

    return views


def describe(model: "Model") -> dict[str, Any]:
    """A model's metadata, as the protocol has it."""
    spec, bundle = model.bundle.input, model.bundle
    shape = [] if tensors.takes_bytes(spec) else list(spec.shape)
    if _has_tensor(model):
        datatype, output_shape = tensors.DATATYPES[bundle.output.dtype], list(bundle.output.shape)
    else:
        # What the model's own code makes of a row isn't in the manifest, but the examples have it.
        answer, request = bundle.examples[0].response["output"], bundle.examples[0].request
        single = spec.rows(request["data"], bundle.max_rows).single
        output = tensors.Output.of([answer] if single else answer)
        datatype, output_shape = output.datatype, output.shape[1:]
    return {
        "name": model.name,
        "versions": [model.version],
        "platform": "pytorch",
        "inputs": [{"name": "input", "datatype": tensors.input_datatype(spec), "shape": [-1, *shape]}],
        "outputs": [{"name": "output", "datatype": datatype, "shape": [-1, *output_shape]}],
    }


def _has_tensor(model: "Model") -> bool:
    return model.bundle.output.kind != "json" and not hasattr(model.module, "postprocess")


def _parts(request: Request) -> tuple[dict[str, Any], memoryview]:
    """The JSON object of a body, and the bytes behind it."""
    body, text = memoryview(request.body), request.header(HEADER_LENGTH)
    length = len(body)
    if text is not None:
        if not (text.isascii() and text.isdigit() and len(text) < 20 and int(text) <= length):
            raise BadRequest(f"{HEADER_LENGTH} must be the number of bytes of JSON, at most those of the body")
        length = int(text)
    try:
        header = orjson.loads(body[:length])
    except ValueError:
        raise BadRequest(
            f"the body is not JSON; where tensors follow the JSON as bytes, send {HEADER_LENGTH}"
        ) from None
    if type(header) is not dict:
        raise BadRequest("the body must be a JSON object")
    if "id" in header and type(header["id"]) is not str:
        raise BadRequest("id must be a string")
    return header, body[length:]


def _single_input(header: dict[str, Any]) -> dict[str, Any]:
    inputs = header.get("inputs")
    if type(inputs) is not list or len(inputs) != 1 or type(inputs[0]) is not dict or inputs[0].get("name") != "input":
        raise BadRequest('inputs must be a list of one object, with the name "input"')
    return inputs[0]


def _wish(header: dict[str, Any], model: "Model") -> _Wish:
    binary = _parameter(header, "the request", "binary_data_output", bool)
    outputs = header.get("outputs", [])
    if type(outputs) is not list or len(outputs) > 1:
        raise BadRequest('outputs must be a list of at most one object, with the name "output"')
    for output in outputs:
        if type(output) is not dict or output.get("name") != "output":
            raise BadRequest('the only output is the one with the name "output"')
        own = _parameter(output, "an output", "binary_data", bool)
        classes = _parameter(output, "an output", "classification", int)
        if classes is not None and (classes < 1 or model.bundle.output.kind != "classes" or not _has_tensor(model)):
            raise BadRequest("classification must be a number of classes, from 1, and the model a classifier")
        return _Wish(bool(binary if own is None else own), classes)
    return _Wish(bool(binary))


def _seconds(header: dict[str, Any]) -> float | None:
    """How long the client waits; it says so in microseconds."""
    timeout = _parameter(header, "the request", "timeout", int)
    if timeout is None or timeout == 0:
        return None
    if not 0 < timeout <= LONGEST_TIMEOUT_SECONDS * 1_000_000:
        raise BadRequest(f"timeout must be a number of microseconds up to {LONGEST_TIMEOUT_SECONDS * 1_000_000}")
    return timeout / 1_000_000


def _parameter(holder: dict[str, Any], whose: str, name: str, kind: type) -> Any:
    parameters = tensors.parameters(holder, whose)
    value = parameters.get(name)
    if name in parameters and type(value) is not kind:
        raise BadRequest(f"the parameter {name} must be {'true or false' if kind is bool else 'a whole number'}")
    return value


def _render(model: "Model", request_id: str | None, wish: _Wish, values: Any) -> Reply:
    output = tensors.Output.of(values) if wish.classes is None else _likeliest(model, values, wish.classes)
    described: dict[str, Any] = {"name": "output", "datatype": output.datatype, "shape": output.shape}
    answer: dict[str, Any] = {"model_name": model.name, "model_version": model.version, "outputs": [described]}
    if request_id is not None:
        answer["id"] = request_id
    if not wish.binary:
        described["data"] = output.listed()
        return Reply(to_json(answer))
    raw = output.raw()
    described["parameters"] = {"binary_data_size": len(raw)}
    header = to_json(answer)
    return Reply(header + raw, content_type="application/octet-stream", headers=((HEADER_LENGTH, str(len(header))),))


def _likeliest(model: "Model", scores: Any, classes: int) -> tensors.Output:
    """Of each row the ``classes`` likeliest classes, each as the string ``probability:index:label``."""
    spec = model.bundle.output
    rows = spec.likeliest(scores, classes)
    strings = [f"{probability:f}:{index}:{spec.labels[index]}".encode() for row in rows for probability, index in row]
    return tensors.Output("BYTES", [len(rows), len(rows[0])], strings)


def operations(models: Models) -> list[Operation]:
    """Of these routes."""
    live = json_content(record(live={"type": "boolean"}))
    ready = json_content(record(ready={"type": "boolean"}))
    server = json_content(record(name=_TEXT, version=_TEXT, extensions={"type": "array", "items": _TEXT}))
    index = json_content({"type": "array", "items": record(name=_TEXT, version=_TEXT, state=_TEXT, reason=_TEXT)})
    found = [
        Operation("GET", "/v2", _TAG, "The server", server),
        Operation("GET", "/v2/", _TAG, "The server", server),
        Operation("GET", "/v2/health/live", _TAG, "Whether the server is alive", live),
        Operation("GET", "/v2/health/ready", _TAG, "Whether every model is ready", ready, unready=ready),
        Operation("POST", "/v2/repository/index", _TAG, "The models", index, json_content({"type": "object"})),
    ]
    for model in models.all:
        for path in (f"/v2/models/{model.name}", f"/v2/models/{model.name}/versions/{model.version}"):
            found += _operations(path, model)
    return found


_TEXT = {"type": "string"}


def _operations(path: str, model: "Model") -> list[Operation]:
    metadata = describe(model)
    [taken], [made] = metadata["inputs"], metadata["outputs"]
    tensor = {"name": {**_TEXT, "enum": ["input"]}, "shape": _shape(taken), "datatype": _TEXT, "data": _LIST}
    request = {
        "id": _TEXT,
        "parameters": {"type": "object"},
        "inputs": {"type": "array", "items": record(**tensor), "minItems": 1, "maxItems": 1},
        "outputs": {"type": "array", "items": record(name={**_TEXT, "enum": ["output"]}), "maxItems": 1},
    }
    output = record(name=_TEXT, datatype=_TEXT, shape={"type": "array", "items": {"type": "integer"}})
    answer = record(model_name=_TEXT, model_version=_TEXT, outputs={"type": "array", "items": output})
    body = json_content({"type": "object", "properties": request, "required": ["inputs"]}, _example(model, taken))
    ready = json_content(record(name=_TEXT, ready={"type": "boolean"}))
    return [
        Operation(
            "POST",
            f"{path}/infer",
            _TAG,
            f"Predict with {model.name}: {made['datatype']} from {taken['datatype']}",
            json_content(answer) | file_content(),
            body | file_content(),
            predicts=True,
        ),
        Operation("GET", path, _TAG, f"The tensors of {model.name}", json_content(record(name=_TEXT), metadata)),
        Operation("GET", f"{path}/ready", _TAG, f"Whether {model.name} is ready", ready, unready=ready),
    ]


_LIST = {"type": "array", "items": {}}


def _shape(tensor: dict[str, Any]) -> dict[str, Any]:
    rank = len(tensor["shape"])
    return {"type": "array", "items": {"type": "integer", "minimum": 1}, "minItems": rank, "maxItems": rank}


def _example(model: "Model", tensor: dict[str, Any]) -> dict[str, Any]:
    bundle = model.bundle
    data = bundle.examples[0].request["data"]
    rows = [data] if bundle.input.rows(data, bundle.max_rows).single else data
    shape = [len(rows), *tensor["shape"][1:]]
    return {"inputs": [{"name": "input", "shape": shape, "datatype": tensor["datatype"], "data": rows}]}
