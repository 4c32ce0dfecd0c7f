"""What the protocols and the thing that runs models say to each other.

A protocol turns an HTTP request into a ``Call`` of a model and the model's outputs into a ``Reply``. It knows neither
sockets nor threads nor batches.
"""

import json
import re
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model_server.model import Model

JSON = "application/json"


@dataclass(slots=True)
class Request:
    """One HTTP request. ``path`` is without the query and decoded; ``body`` is whole and of an accepted size."""

    method: str
    path: str
    # As waitress has them: CONTENT_TYPE for Content-Type.
    headers: Mapping[str, str]
    body: bytes

    def header(self, name: str) -> str | None:
        """The value of a header, several of them joined by commas, or None."""
        return self.headers.get(name.upper().replace("-", "_"))


@dataclass(slots=True)
class Reply:
    """One HTTP answer, but for the headers that all answers have."""

    body: bytes
    status: int = 200
    content_type: str = JSON
    headers: tuple[tuple[str, str], ...] = ()


class Refusal(Exception):
    """A request that gets an error instead of a prediction.

    ``message`` is for the client: it must hold no path, no internal name and none of the client's values.
    ``reason`` is a label for the metric of rejected requests.
    """

    def __init__(
        self, status: int, message: str, *, reason: str = "invalid", headers: tuple[tuple[str, str], ...] = ()
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.reason = reason
        self.headers = headers


@dataclass(slots=True, eq=False)
class Call:
    """Rows for one model, and what to do with its outputs.

    ``rows`` has passed the model's input specification: a list with one value a row, or, from protocols that carry
    tensors, a tensor of shape [rows, …]. ``render`` gets one output for each row, in the same order: a list of JSON
    values, or a tensor of shape [rows, …] where ``wants_tensor`` is set and the model's output is one. What it
    raises counts as a failure of the model, except ``Refusal``. ``seconds`` is how long the client waits, or None.
    """

    model: "Model"
    rows: Sequence[Any]
    render: Callable[[Any], Reply]
    wants_tensor: bool = False
    seconds: float | None = None

    # The rest is the executor's. `size` is of the body, in bytes.
    request_id: str = ""
    size: int = 0
    received: float = field(default_factory=time.perf_counter)
    queue_seconds: float = 0.0
    model_seconds: float = 0.0
    finish: Callable[["Call", Reply | Exception], None] | None = None
    is_alive: Callable[[], bool] | None = None
    context: Any = None

    @property
    def deadline(self) -> float | None:
        """When the client stops waiting, of ``time.perf_counter``."""
        return None if self.seconds is None else self.received + self.seconds


def error_body(status: int, message: str) -> bytes:
    """The form that errors have unless a protocol has its own."""
    return json.dumps({"error": message}).encode()


class Route:
    """A route that predicts. ``rule`` is in Flask's notation: ``/v2/models/<name>/infer``; it is also the path's label
    in metrics. ``begin`` gets the request and the parts of its path that the rule names.
    """

    def __init__(
        self,
        rule: str,
        begin: Callable[[Request, Mapping[str, str]], Call],
        *,
        method: str = "POST",
        error: Callable[[int, str], bytes] = error_body,
    ) -> None:
        self.rule = rule
        self.begin = begin
        self.method = method
        self.error = error
        self.pattern = re.compile(re.sub(r"<(\w+)>", r"(?P<\1>[^/]+)", rule)) if "<" in rule else None


class Models:
    """The models that a colour serves; the first is the one that paths without a name mean."""

    def __init__(self, models: Sequence["Model"]) -> None:
        self.all = tuple(models)
        self.default = self.all[0]
        self._by_name = {model.name: model for model in self.all}

    def find(self, name: str, version: str | None = None) -> "Model":
        """The model of that name, in that version where one is given. Raises Refusal (404)."""
        model = self._by_name.get(name)
        if model is None:
            raise Refusal(404, "there is no model of that name", reason="unknown_model")
        if version is not None and version != model.version:
            raise Refusal(404, "the model isn't served in that version", reason="unknown_model")
        return model


def plain_body(body: bytes, content_encoding: str | None, limit: int) -> bytes:
    """A body without what its header Content-Encoding says, if there is one.

    It may have ``limit`` bytes, before and after. Raises Refusal (400, 413, 415).
    """
    if len(body) > limit:
        raise _too_large(f"has {len(body)} bytes", limit)
    encoding = content_encoding.strip().lower() if content_encoding else ""
    if encoding in ("", "identity"):
        return body
    if encoding not in ("gzip", "x-gzip", "deflate"):
        raise Refusal(415, "the Content-Encoding must be gzip, deflate or identity")
    # 32 has zlib find out by itself whether gzip's header comes or its own.
    decoder = zlib.decompressobj(zlib.MAX_WBITS + 32)
    try:
        plain = decoder.decompress(body, limit + 1)
    except zlib.error:
        raise Refusal(400, "the body isn't what its Content-Encoding says") from None
    if len(plain) > limit:
        raise _too_large("is larger", limit)
    if not decoder.eof or decoder.unused_data:
        raise Refusal(400, "the body isn't what its Content-Encoding says")
    return plain


def _too_large(what: str, limit: int) -> Refusal:
    return Refusal(413, f"the body {what}; at most {limit} bytes are accepted", reason="too_large")


# The header with which a client says for how many seconds it waits, and the most that it, or a protocol's own way of
# saying so, may be.
TIMEOUT_HEADER = "X-Request-Timeout"
LONGEST_TIMEOUT_SECONDS = 3600


def client_seconds(headers: Mapping[str, str]) -> float | None:
    """How long the client waits, by its header, or None. Raises Refusal (400)."""
    text = headers.get("X_REQUEST_TIMEOUT")
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds <= LONGEST_TIMEOUT_SECONDS:
        raise Refusal(400, f"{TIMEOUT_HEADER} must be a number of seconds up to {LONGEST_TIMEOUT_SECONDS}")
    return seconds
