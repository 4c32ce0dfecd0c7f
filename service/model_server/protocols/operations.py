"""What a protocol says of each of its routes in the OpenAPI document."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from model_server.core import JSON
from model_server.protocols import forms

if TYPE_CHECKING:
    from model_server.model import Model

BINARY = "application/octet-stream"

# For each media type that a body may have: its schema, and mostly an example.
Content = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Operation:
    """One method of one path; the path is concrete, with the model's name in it.

    ``predicts``: it may be refused as any prediction may be. ``unready`` is the answer with the status 503 of what
    tells whether something is ready. ``error`` names the schema of errors. ``statuses`` are those of the answer;
    ``refusals`` those of errors, and ``parameters`` in OpenAPI's form, where they aren't those of any prediction.
    """

    method: str
    path: str
    tag: str
    summary: str
    answer: Content
    body: Content | None = None
    predicts: bool = False
    unready: Content | None = None
    error: str = "Error"
    statuses: Sequence[int] = (200,)
    refusals: Sequence[int] = ()
    parameters: Sequence[dict[str, Any]] = ()


def json_content(schema: dict[str, Any], example: Any = None) -> Content:
    """A body of JSON; ``example`` is None where there is none."""
    return {JSON: {"schema": schema} if example is None else {"schema": schema, "example": example}}


def file_content() -> Content:
    """A body that is one file."""
    return {BINARY: {"schema": {"type": "string", "format": "binary"}}}


def form_content(field: str) -> Content:
    """A form with a file."""
    properties = {field: {"type": "string", "format": "binary"}}
    return {forms.FORM: {"schema": {"type": "object", "properties": properties, "required": [field]}}}


def record(**properties: dict[str, Any]) -> dict[str, Any]:
    """The schema of an object that has all of ``properties``."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def list_of(schema: dict[str, Any], model: "Model") -> dict[str, Any]:
    """The schema of a list with something for each row of a request."""
    return {"type": "array", "items": schema, "minItems": 1, "maxItems": model.bundle.max_rows}


def one_or_list(schema: dict[str, Any], model: "Model") -> dict[str, Any]:
    """The schema of something for a single row, or a list with that for each row."""
    return {"anyOf": [schema, list_of(schema, model)]}


def row_schema(model: "Model") -> dict[str, Any]:
    """The schema of one row."""
    return model.bundle.input.schema()


def value_schema(model: "Model") -> dict[str, Any]:
    """The schema of what one row is answered with."""
    spec = model.bundle.output
    if hasattr(model.module, "postprocess"):
        return {}
    # A row with one number is answered with that number and not with a list of one.
    return spec.schema()["items"] if spec.kind == "tensor" and spec.shape == (1,) else spec.schema()


def example_of(model: "Model") -> tuple[Any, Any]:
    """The rows of the bundle's first example, as in the member "data" of a request, and what they are answered with."""
    example = model.bundle.examples[0]
    return example.request["data"], example.response["output"]
