"""The appliance's own protocol: ``POST /predict`` with ``{"data": …}``, answered with ``{"output": …}``.

Models whose rows are images also take an image as it is, and forms with files.
"""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.formparser import FormDataParser
from werkzeug.http import parse_options_header

from model_server import payload
from model_server.core import JSON, Call, Models, Reply, Request, Route

if TYPE_CHECKING:
    from model_server.model import Model

_FORM = "multipart/form-data"
# Beside the files; browsers send a few.
_TEXT_PARTS = 16
_TEXT_BYTES = 500_000


def routes(models: Models) -> Sequence[Route]:
    """The routes that predict."""

    def predict(request: Request, _: Mapping[str, str]) -> Call:
        model = models.default
        rows = rows_of(request, model)
        return Call(model, rows.values, lambda outputs: Reply(payload.render(outputs, rows.single)))

    return [Route("/predict", predict)]


def rows_of(request: Request, model: "Model") -> payload.Rows:
    """The rows that a request has for ``model``: of its JSON, or the image or the files that it is. Raises BadRequest.

    A form with one file counts as a single row, with several as a list of them in their order.
    """
    spec, max_rows = model.bundle.input, model.bundle.max_rows
    if spec.kind == "image" and request.body:
        content_type, options = parse_options_header(request.header("Content-Type"))
        if content_type == _FORM:
            files = _files(request.body, options, max_rows)
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


def _files(body: bytes, options: dict[str, str], max_rows: int) -> list[bytes]:
    files: list[io.BytesIO] = []

    # Called for each file in its turn. Files stay in memory: the whole body is there already.
    def new_file(**_: object) -> io.BytesIO:
        files.append(io.BytesIO())
        return files[-1]

    parser = FormDataParser(
        new_file, max_form_memory_size=_TEXT_BYTES, max_form_parts=max_rows + _TEXT_PARTS, silent=False
    )
    try:
        parser.parse(io.BytesIO(body), _FORM, len(body), options)
    except RequestEntityTooLarge:
        raise payload.BadRequest(
            f"the form has too many parts or too much text; at most {max_rows} files are taken"
        ) from None
    except ValueError:
        raise payload.BadRequest("the body isn't a form as its Content-Type describes it") from None
    if not files:
        raise payload.BadRequest("the form has no file")
    return [file.getvalue() for file in files]
