"""The appliance's own protocol: ``POST /predict`` with ``{"data": …}``, answered with ``{"output": …}``.

Models whose rows are images also take an image as it is, and forms with files.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from model_server import payload
from model_server.core import JSON, Call, Models, Reply, Request, Route
from model_server.protocols import forms

if TYPE_CHECKING:
    from model_server.model import Model


def routes(models: Models) -> Sequence[Route]:
    """The route that predicts."""
    return predicting(models, ["/predict"])


def predicting(models: Models, rules: Sequence[str]) -> list[Route]:
    """Routes that take and answer what ``/predict`` does, for the model that the path names or the default one."""

    def predict(request: Request, path: Mapping[str, str]) -> Call:
        model = models.find(path["name"]) if path else models.default
        rows = rows_of(request, model)
        return Call(model, rows.values, lambda outputs: Reply(payload.render(outputs, rows.single)))

    return [Route(rule, predict) for rule in rules]


def rows_of(request: Request, model: "Model") -> payload.Rows:
    """The rows that a request has for ``model``: of its JSON, or the image or the files that it is. Raises BadRequest.

    A form with one file counts as a single row, with several as a list of them in their order.
    """
    spec, max_rows = model.bundle.input, model.bundle.max_rows
    if spec.kind == "image" and request.body:
        content_type, options = forms.content_type(request)
        if content_type == forms.FORM:
            files = [data for _, data in forms.read(request.body, options, max_rows).files]
            if not files:
                raise payload.BadRequest("the form has no file")
            payload.check_count(len(files), max_rows)
            return payload.Rows(files, single=len(files) == 1)
        if _is_image(content_type, request.body):
            return payload.Rows([request.body], single=True)
    return payload.parse(request.body, spec, max_rows)


def _is_image(content_type: str, body: bytes) -> bool:
    if content_type.startswith("image/") or content_type == "application/octet-stream":
        return True
    # Clients name other types by mistake, curl its own.
    return content_type != JSON and not body.lstrip().startswith(b"{")
