"""The bodies of ``POST /predict``: checking what comes in, writing what goes out."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import orjson

# The numbers that fit each type; anything outside would reach the model as an infinity or not at all.
_RANGES: dict[str, tuple[float, float]] = {
    "float32": (-3.4028234663852886e38, 3.4028234663852886e38),
    "float64": (-1.7976931348623157e308, 1.7976931348623157e308),
    "int32": (-(2**31), 2**31 - 1),
    "int64": (-(2**63), 2**63 - 1),
    "bool": (False, True),
}
DTYPES = tuple(_RANGES)

# Characters of a request or an answer in a message.
_SHOWN = 200
_NOT_FINITE = "the model has no finite answer for these numbers"

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
    """A body that can't be predicted on; the message is for the client and repeats none of its values.

    ``column`` is where along the last dimension a number is at fault, where one is; ``is_missing`` where it is null.
    """

    def __init__(self, message: str, column: int | None = None, is_missing: bool = False) -> None:
        super().__init__(message)
        self.column = column
        self.is_missing = is_missing


class UnusableOutput(ValueError):
    """The model's output can't be written as JSON."""


class NotFinite(UnusableOutput):
    """A number of the output is infinite or not a number; the message is for the client."""


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of one request, one value each; ``single`` where the client sent one row and not a list of rows."""

    values: list[Any]
    single: bool


class InputSpec(Protocol):
    """What a model takes, by the manifest's ``input``.

    ``shape`` is of one row, without the dimension that counts rows; ``dtype`` is PyTorch's name, or ``bytes``.
    """

    kind: str
    shape: tuple[int, ...]
    dtype: str

    def rows(self, data: Any, max_rows: int) -> Rows:
        """Check the member "data" of a JSON body. Raises BadRequest."""

    def prepare(self, rows: Sequence[Any]) -> Sequence[Any]:
        """What the model gets of checked rows. Runs where the model runs. Raises BadRequest."""

    def describe(self) -> str:
        """For messages: ``float32 of shape [2]``."""

    def schema(self) -> dict[str, Any]:
        """The JSON schema of one row."""


class OutputSpec(Protocol):
    """What a model answers for a row, by the manifest's ``output``. ``labels`` are the classes of a classifier."""

    kind: str
    shape: tuple[int, ...]
    dtype: str
    labels: tuple[str, ...]

    def check(self, output: Any) -> None:
        """Whether a tensor is of shape [rows, *shape] and of the promised type. Raises TypeError."""

    def values(self, output: Any) -> list[Any]:
        """A JSON value for each row of a tensor. Raises TypeError, NotFinite."""

    def schema(self) -> dict[str, Any]:
        """The JSON schema of one row's value."""


@dataclass(frozen=True)
class TensorSpec:
    """Numbers of one type and shape, in or out."""

    shape: tuple[int, ...]
    dtype: str
    features: tuple[str, ...] = ()

    kind = "tensor"
    labels: tuple[str, ...] = ()

    def describe(self) -> str:
        """For messages: ``float32 of shape [2]``."""
        return f"{self.dtype} of shape {list(self.shape)}"

    def rows(self, data: Any, max_rows: int) -> Rows:
        """One row, or a list of 1 to ``max_rows`` of them. Raises BadRequest."""
        depth, rank = _depth(data), len(self.shape)
        if depth == rank:
            values, single = [data], True
        elif depth == rank + 1:
            values, single = data, False
        else:
            raise BadRequest(f"data must be one row ({self.describe()}) or a list of such rows")
        check_count(len(values), max_rows)
        check = _Check(self)
        for index, row in enumerate(values):
            check.row(row, "data" if single else f"data[{index}]")
        return Rows(values, single)

    def prepare(self, rows: Sequence[Any]) -> Sequence[Any]:
        """Nothing to do."""
        return rows

    def check(self, output: Any) -> None:
        """Raises TypeError where ``output`` isn't a tensor of shape [rows, *shape] and of the promised type."""
        promised = f"the manifest promises {self.describe()} for each row, the model returned"
        if not hasattr(output, "shape"):
            raise TypeError(f"{promised} {type(output).__name__} and no tensor")
        if tuple(output.shape[1:]) != self.shape or str(output.dtype) != f"torch.{self.dtype}":
            raise TypeError(f"{promised} {output.dtype} of shape {list(output.shape)}")

    def values(self, output: Any) -> list[Any]:
        """The numbers of each row. Raises TypeError."""
        self.check(output)
        # A row with one number is written as that number and not as a list of one.
        return (output.flatten() if self.shape == (1,) else output).tolist()

    def schema(self) -> dict[str, Any]:
        """The JSON schema of one row."""
        low, high = _RANGES[self.dtype]
        schema: dict[str, Any]
        if self.dtype == "bool":
            schema = {"type": "boolean"}
        else:
            kind = "integer" if self.dtype.startswith("int") else "number"
            schema = {"type": kind, "minimum": low, "maximum": high}
        for size in reversed(self.shape):
            schema = {"type": "array", "items": schema, "minItems": size, "maxItems": size}
        return schema


@dataclass(frozen=True)
class ClassesSpec:
    """One of several classes, with how sure the model is. ``top`` is how many classes an answer holds.

    The model returns float32 of shape [rows, classes]: scores where ``activation`` is ``softmax``, probabilities where
    it is ``none``.
    """

    labels: tuple[str, ...]
    top: int
    activation: str

    kind = "classes"
    dtype = "float32"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one row of the model's output."""
        return (len(self.labels),)

    def check(self, output: Any) -> None:
        """Raises TypeError where ``output`` isn't a float32 tensor of shape [rows, classes]."""
        TensorSpec(self.shape, self.dtype).check(output)

    def values(self, output: Any) -> list[Any]:
        """Each row's class and its probability, and the most probable classes. Raises TypeError, NotFinite."""
        values = []
        for best in self.likeliest(output, self.top):
            top = [{"class": self.labels[index], "probability": probability} for probability, index in best]
            values.append({**top[0], "top": top})
        return values

    def likeliest(self, output: Any, count: int) -> list[list[tuple[float, int]]]:
        """Of each row the probability and the number of its likeliest classes, best first: ``count``, or all there are.

        Raises TypeError, NotFinite.
        """
        self.check(output)
        best = (output.softmax(-1) if self.activation == "softmax" else output).topk(min(count, len(self.labels)))
        # Here and not when the answer is written: what isn't finite would spoil the metrics for good.
        if not best.values.isfinite().all():
            raise NotFinite(_NOT_FINITE)
        return [
            list(zip(probabilities, indices, strict=True))
            for probabilities, indices in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]

    def schema(self) -> dict[str, Any]:
        """The JSON schema of one row's value."""
        label = {"type": "string", "enum": list(self.labels)}
        one = {
            "type": "object",
            "properties": {"class": label, "probability": {"type": "number"}},
            "required": ["class", "probability"],
        }
        top = {"type": "array", "items": one, "minItems": self.top, "maxItems": self.top}
        return {
            "type": "object",
            "properties": {**one["properties"], "top": top},
            "required": [*one["required"], "top"],
        }


def document(body: bytes) -> dict[str, Any]:
    """The JSON object that a body holds. Raises BadRequest."""
    if not body:
        raise BadRequest('the body is empty; send {"data": …}')
    try:
        found = orjson.loads(body)
    except ValueError:
        raise BadRequest(_why_not_json(body)) from None
    if type(found) is not dict:
        raise BadRequest("the body must be a JSON object")
    return found


def parse(body: bytes, spec: InputSpec, max_rows: int) -> Rows:
    """Read ``{"data": …}``: one row of ``spec``, or a list of 1 to ``max_rows`` of them. Raises BadRequest."""
    found = document(body)
    if "data" not in found:
        raise BadRequest('the body must be an object with the member "data"')
    return spec.rows(found["data"], max_rows)


def check_count(rows: int, max_rows: int) -> None:
    """Raises BadRequest where a request has no rows or too many."""
    if not rows:
        raise BadRequest("data has no rows")
    if rows > max_rows:
        raise BadRequest(f"data has {rows} rows; this model takes at most {max_rows} in one request")


def render(outputs: list[Any], single: bool) -> bytes:
    """Write ``{"output": …}`` from one value for each row. Raises NotFinite, UnusableOutput."""
    return to_json({"output": outputs[0] if single else outputs})


def to_json(answer: Any) -> bytes:
    """Write an answer that holds a model's outputs. Raises NotFinite, UnusableOutput."""
    try:
        body = orjson.dumps(answer)
        # orjson writes what isn't finite as null, which an output may also hold by right.
        if b"null" not in body:
            return body
    except TypeError:
        pass
    try:
        return json.dumps(answer, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as error:
        if isinstance(error, ValueError) and _has_infinite(answer):
            raise NotFinite(_NOT_FINITE) from None
        raise UnusableOutput(f"the output can't be written as JSON: {error}") from error


def _has_infinite(value: Any) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _why_not_json(body: bytes) -> str:
    try:
        json.loads(body, parse_constant=_refuse_constant)
    except BadRequest as error:
        return str(error)
    except (ValueError, RecursionError):
        return 'the body is not JSON; send {"data": …}'
    return "the body holds a number that is out of range, or text that is not Unicode"


def shortened(text: str) -> str:
    """The beginning of a JSON text for a message, which says how much is left out."""
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}… ({len(text)} characters)"


def same(expected: Any, actual: Any, tolerance: float, rounding: float = 0.0) -> bool:
    """Whether two JSON values agree: numbers within the absolute ``tolerance``, everything else exactly.

    What isn't a whole number may differ by the part ``rounding`` of itself besides.
    """
    if _is_number(expected) and _is_number(actual):
        if isinstance(expected, float):
            tolerance += rounding * math.fabs(expected)
        try:
            return math.fabs(expected - actual) <= tolerance
        except OverflowError:
            return False
    if type(expected) is not type(actual):
        return False
    if isinstance(expected, list):
        return len(expected) == len(actual) and all(
            same(left, right, tolerance, rounding) for left, right in zip(expected, actual, strict=True)
        )
    if isinstance(expected, dict):
        return expected.keys() == actual.keys() and all(
            same(value, actual[key], tolerance, rounding) for key, value in expected.items()
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

    def _part(self, value: Any, shape: tuple[int, ...], where: str, column: int | None = None) -> None:
        if not shape:
            self._number(value, where, column)
            return
        if type(value) is not list:
            raise BadRequest(f"{where} must be a list of {shape[0]}, not {_KINDS[type(value)]}")
        if len(value) != shape[0]:
            raise BadRequest(f"{where} must have {shape[0]} elements, not {len(value)}")
        inner = shape[1:]
        for index, part in enumerate(value):
            # The innermost numbers are by far the most, so the good ones skip the call and the message.
            if inner or type(part) not in self._types or not self._low <= part <= self._high:
                self._part(part, inner, f"{where}[{index}]", index)

    def _number(self, value: Any, where: str, column: int | None) -> None:
        if type(value) not in self._types:
            raise BadRequest(f"{where} must be {self._wanted}, not {_KINDS[type(value)]}", column, value is None)
        if not self._low <= value <= self._high:
            raise BadRequest(f"{where} is out of the range of {self._spec.dtype}", column)
