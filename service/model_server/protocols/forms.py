"""Forms with files, as browsers and ``curl -F`` send them."""

import io
from dataclasses import dataclass

from werkzeug.exceptions import RequestEntityTooLarge
from werkzeug.formparser import FormDataParser
from werkzeug.http import parse_options_header

from model_server.core import Request
from model_server.payload import BadRequest

FORM = "multipart/form-data"
# Beside those with rows; browsers send a few.
_OTHER_PARTS = 16


@dataclass(frozen=True)
class Form:
    """The parts of a form with their fields' names, in their order."""

    files: list[tuple[str, bytes]]
    texts: list[tuple[str, bytes]]


def content_type(request: Request) -> tuple[str, dict[str, str]]:
    """The media type of a body, in small letters, and its options."""
    return parse_options_header(request.header("Content-Type"))


def read(body: bytes, options: dict[str, str], max_rows: int) -> Form:
    """Take a form apart; ``options`` are those of its Content-Type. Raises BadRequest."""
    streams: list[io.BytesIO] = []

    # Called for each file in its turn. Files stay in memory: the whole body is there already.
    def new_file(**_: object) -> io.BytesIO:
        streams.append(io.BytesIO())
        return streams[-1]

    parser = FormDataParser(
        new_file, max_form_memory_size=len(body), max_form_parts=max_rows + _OTHER_PARTS, silent=False
    )
    try:
        _, texts, files = parser.parse(io.BytesIO(body), FORM, len(body), options)
    except RequestEntityTooLarge:
        raise BadRequest(f"the form has too many parts; at most {max_rows} rows are taken") from None
    except ValueError:
        raise BadRequest("the body isn't a form as its Content-Type describes it") from None
    names = {id(file.stream): name for name, file in files.items(multi=True)}
    return Form(
        files=[(names[id(stream)], stream.getvalue()) for stream in streams],
        texts=[(name, text.encode()) for name, text in texts.items(multi=True)],
    )
