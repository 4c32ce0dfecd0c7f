"""Whether two colours say the same to the same request: by the class where there are classes, by distance for numbers.

The service's protocols and the forms of their answers are those of docs/api.md. What always differs between two
releases, such as the version in an answer, isn't compared.
"""

from __future__ import annotations

import json
import math
import re
import struct
from dataclasses import dataclass
from typing import Any

from rollout.unixhttp import Answer

NATIVE, KSERVE, TORCHSERVE, OIP = "native", "kserve", "torchserve", "oip"
_NAME = r"(?P<model>[A-Za-z][A-Za-z0-9_-]{0,62})"
_VERSION = r"[0-9A-Za-z][0-9A-Za-z.+-]{0,62}"
# What predicts and does nothing else: only this may be asked a second time.
_ROUTES = tuple(
    (protocol, re.compile(rf"{route}(\?[\x21-\x7e]*)?"))
    for protocol, route in (
        (NATIVE, r"POST (/|/predict|/v1/predict|/v1beta1/predict)"),
        (NATIVE, rf"POST /v1/model/{_NAME}/predict"),
        (KSERVE, rf"POST /v1/models/{_NAME}:predict"),
        (TORCHSERVE, rf"(POST|PUT) /predictions/{_NAME}(/{_VERSION})?"),
        (OIP, rf"POST /v2/models/{_NAME}(/versions/{_VERSION})?/infer"),
    )
)
_FORMATS = {"FP32": "f", "FP64": "d", "INT32": "i", "INT64": "q", "BOOL": "?"}
_LENGTH = struct.Struct("<I")
# What reading an answer in the form of its protocol raises when it has another one.
_OTHER_FORM = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, struct.error)


@dataclass(frozen=True)
class Prediction:
    """What a request asks for: in which protocol, and of which model where its path names one."""

    protocol: str
    model: str | None

    @property
    def hides_classes(self) -> bool:
        """Whether an answer doesn't show by itself that it is a classifier's."""
        return self.protocol in (TORCHSERVE, OIP)


@dataclass(frozen=True)
class Comparison:
    """`distance` is the largest difference of two numbers in the same place; None where no numbers were compared."""

    agree: bool
    distance: float | None = None


def prediction(method: str, path: str) -> Prediction | None:
    """What a request asks for, by its method and its path with the query; None where it isn't a prediction."""
    for protocol, route in _ROUTES:
        match = route.fullmatch(f"{method} {path}")
        if match:
            return Prediction(protocol, match.groupdict().get("model"))
    return None


def compare(live: Answer, idle: Answer, asked: Prediction, *, classifier: bool, tolerance: float) -> Comparison:
    """Compare two answers with the same status to a prediction.

    A classifier agrees when it predicts the same class, however sure it is. Numbers agree up to `tolerance` times the
    live one, or times 1 where that is smaller; everything else must be equal. `classifier` says what the answer to a
    prediction that `hides_classes` doesn't.
    """
    walk = _Walk(tolerance)
    try:
        walk.look(_said(live, asked, classifier), _said(idle, asked, classifier))
    except RecursionError:
        # Nested as deeply as no model's answer is.
        return Comparison(live.body == idle.body)
    return Comparison(walk.agree, walk.distance)


class _Walk:
    """Looks at two values place by place."""

    def __init__(self, tolerance: float) -> None:
        self.agree = True
        self.distance: float | None = None
        self._tolerance = tolerance

    def look(self, live: Any, idle: Any) -> None:
        if type(live) in (int, float) and type(idle) in (int, float):
            gap = _gap(live, idle)
            self.distance = max(gap, self.distance or 0.0)
            if gap > self._tolerance * max(1.0, abs(live)):
                self.agree = False
        elif type(live) is dict and type(idle) is dict and live.keys() == idle.keys():
            for key in live:
                self.look(live[key], idle[key])
        elif type(live) is list and type(idle) is list and len(live) == len(idle):
            for one, other in zip(live, idle, strict=True):
                self.look(one, other)
        elif type(live) is not type(idle) or live != idle:
            self.agree = False


def _gap(live: float, idle: float) -> float:
    if live == idle or (math.isnan(live) and math.isnan(idle)):
        return 0.0
    gap = abs(live - idle)
    return math.inf if math.isnan(gap) else gap


def _said(answer: Answer, asked: Prediction, classifier: bool) -> Any:
    """What an answer says: the class of each row where there are classes. The body where it has another form."""
    try:
        if asked.protocol == OIP:
            return [_tensor(output, classifier) for output in _outputs(answer)]
        value = _json(answer.body)
        if asked.protocol == NATIVE:
            return _rows(value["output"], _own_class)
        if asked.protocol == KSERVE:
            return _rows(value["predictions"], _own_class)
        return _rows(value, _likeliest) if classifier else value
    except _OTHER_FORM:
        return answer.body


def _json(text: bytes) -> Any:
    # Every number as a float: an integer may be too large for one, and would spoil the arithmetic.
    return json.loads(text, parse_int=float)


def _rows(value: Any, of_row: Any) -> Any:
    return [of_row(row) for row in value] if type(value) is list else of_row(value)


def _own_class(row: Any) -> Any:
    """The appliance's own form: {"class": …, "probability": …, "top": […]}. Every other value stays as it is."""
    return row["class"] if type(row) is dict and row.keys() == {"class", "probability", "top"} else row


def _likeliest(row: dict[str, float]) -> str:
    """TorchServe's form: {"3": 0.9, "9": 0.1}."""
    return max(row, key=row.__getitem__)


def _outputs(answer: Answer) -> list[dict[str, Any]]:
    """The tensors of an answer of the Open Inference Protocol; `data` is a flat list, also where it came as bytes."""
    length = int(answer.headers.get("inference-header-content-length", len(answer.body)))
    outputs, rest = _json(answer.body[:length])["outputs"], answer.body[length:]
    for output in outputs:
        size = output.get("parameters", {}).get("binary_data_size")
        if size is not None:
            raw, rest = rest[: int(size)], rest[int(size) :]
            output["data"] = _strings(raw) if output["datatype"] == "BYTES" else _numbers(raw, output["datatype"])
    return outputs


def _numbers(raw: bytes, datatype: str) -> list[Any]:
    form = _FORMATS[datatype]
    return list(struct.unpack(f"<{len(raw) // struct.calcsize(f'<{form}')}{form}", raw))


def _strings(raw: bytes) -> list[str]:
    strings, start = [], 0
    while start < len(raw):
        end = start + _LENGTH.size + _LENGTH.unpack_from(raw, start)[0]
        strings.append(raw[start + _LENGTH.size : end].decode())
        start = end
    return strings


def _tensor(output: dict[str, Any], classifier: bool) -> Any:
    if not classifier:
        return [output["datatype"], output["shape"], output["data"]]
    width, data = int(output["shape"][-1]), output["data"]
    rows = [data[start : start + width] for start in range(0, len(data), width)]
    if output["datatype"] == "BYTES":
        # The likeliest classes of each row, best first, as probability:number:label.
        return [row[0].split(":", 2)[2] for row in rows]
    return [row.index(max(row)) for row in rows]
