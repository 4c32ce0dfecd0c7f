"""The bodies of ``POST /predict``: checking what comes in, writing what goes out."""

import json
import math
from dataclasses import dataclass
from typing import Any

# The numbers that fit each type; anything outside would reach the model as an infinity or not at all.
_RANGES: dict[str, tuple[float, float]] = {
    "float32": (-3.4028234663852886e38, 3.4028234663852886e38),
    "float64": (-1.7976931348623157e308, 1.7976931348623157e308),
    "int32": (-(2**31), 2**31 - 1),
    "int64": (-(2**63), 2**63 - 1),
    "bool": (False, True),
}
DTYPES = tuple(_RANGES)

_KINDS: dict[type, str] = {
    bool: "a boolean",
    int: "a number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "an object",
    type(None): "null",
}


class BadRequest(ValueError):
    """A body that can't be predicted on; the message is for the client and repeats none of its values."""


class UnusableOutput(ValueError):
    """The model's output can't be written as JSON."""


class NotFinite(UnusableOutput):
    """A number of the output is infinite or not a number; the message is for the client."""


@dataclass(frozen=True)
class TensorSpec:
    """The shape of one row, without the dimension that counts rows, and the type of its numbers."""

    shape: tuple[int, ...]
    dtype: str

    def describe(self) -> str:
        """For messages: ``float32 of shape [2]``."""
        return f"{self.dtype} of shape {list(self.shape)}"


@dataclass(frozen=True)
class Rows:
    """The rows of one request, as nested lists; ``single`` where the client sent one row and not a list of rows."""

    values: list[Any]
    single: bool


def parse(body: bytes, spec: TensorSpec, max_rows: int) -> Rows:
    """Read ``{"data": …}``: one row of ``spec``, or a list of 1 to ``max_rows`` of them. Raises BadRequest."""
    if not body:
        raise BadRequest('the body is empty; send {"data": …}')
    try:
        document = json.loads(body, parse_constant=_refuse_constant)
    except BadRequest:
        raise
    except (ValueError, RecursionError):
        raise BadRequest('the body is not JSON; send {"data": …}') from None
    if type(document) is not dict or "data" not in document:
        raise BadRequest('the body must be an object with the member "data"')
    data = document["data"]
    depth, rank = _depth(data), len(spec.shape)
    if depth == rank:
        values, single = [data], True
    elif depth == rank + 1:
        values, single = data, False
    else:
        raise BadRequest(f"data must be one row ({spec.describe()}) or a list of such rows")
    if not values:
        raise BadRequest("data has no rows")
    if len(values) > max_rows:
        raise BadRequest(f"data has {len(values)} rows; this model takes at most {max_rows} in one request")
    check = _Check(spec)
    for index, row in enumerate(values):
        check.row(row, "data" if single else f"data[{index}]")
    return Rows(values, single)


def render(outputs: list[Any], single: bool) -> bytes:
    """Write ``{"output": …}`` from one value for each row. Raises NotFinite, UnusableOutput."""
    document = {"output": outputs[0] if single else outputs}
    try:
        try:
            return json.dumps(document, allow_nan=False).encode()
        except ValueError:
            # Anything but a number that isn't finite fails here too.
            json.dumps(document)
            raise NotFinite("the model has no finite answer for these numbers") from None
    except NotFinite:
        raise
    except (TypeError, ValueError, RecursionError) as error:
        raise UnusableOutput(f"the output can't be written as JSON: {error}") from error


def same(expected: Any, actual: Any, tolerance: float) -> bool:
    """Whether two JSON values agree: numbers within the absolute ``tolerance``, everything else exactly."""
    if _is_number(expected) and _is_number(actual):
        try:
            return math.fabs(expected - actual) <= tolerance
        except OverflowError:
            return False
    if type(expected) is not type(actual):
        return False
    if isinstance(expected, list):
        return len(expected) == len(actual) and all(
            same(left, right, tolerance) for left, right in zip(expected, actual, strict=True)
        )
    if isinstance(expected, dict):
        return expected.keys() == actual.keys() and all(
            same(value, actual[key], tolerance) for key, value in expected.items()
        )
    return expected == actual


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


def _refuse_constant(name: str) -> None:
    raise BadRequest(f"the body is not JSON: {name} is not a JSON number")


def _depth(value: Any) -> int:
    depth = 0
    while type(value) is list:
        depth += 1
        if not value:
            break
        value = value[0]
    return depth


class _Check:
    """Checks rows against a specification without building anything, since most rows are right."""

    def __init__(self, spec: TensorSpec) -> None:
        self._spec = spec
        self._low, self._high = _RANGES[spec.dtype]
        if spec.dtype == "bool":
            self._types, self._wanted = (bool,), "true or false"
        elif spec.dtype.startswith("int"):
            self._types, self._wanted = (int,), "a whole number"
        else:
            self._types, self._wanted = (int, float), "a number"

    def row(self, value: Any, where: str) -> None:
        self._part(value, self._spec.shape, where)

    def _part(self, value: Any, shape: tuple[int, ...], where: str) -> None:
        if not shape:
            self._number(value, where)
            return
        if type(value) is not list:
            raise BadRequest(f"{where} must be a list of {shape[0]}, not {_KINDS[type(value)]}")
        if len(value) != shape[0]:
            raise BadRequest(f"{where} must have {shape[0]} elements, not {len(value)}")
        inner = shape[1:]
        for index, part in enumerate(value):
            # The innermost numbers are by far the most, so the good ones skip the call and the message.
            if inner or type(part) not in self._types or not self._low <= part <= self._high:
                self._part(part, inner, f"{where}[{index}]")

    def _number(self, value: Any, where: str) -> None:
        if type(value) not in self._types:
            raise BadRequest(f"{where} must be {self._wanted}, not {_KINDS[type(value)]}")
        if not self._low <= value <= self._high:
            raise BadRequest(f"{where} is out of the range of {self._spec.dtype}")
