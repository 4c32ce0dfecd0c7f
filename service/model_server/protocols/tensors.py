"""Tensors as the Open Inference Protocol writes them: typed, with a shape, as JSON or as bytes after the JSON."""

import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from model_server.payload import BadRequest, InputSpec, TensorSpec, check_count, to_json

if TYPE_CHECKING:
    import torch

# Of PyTorch's types, those that a manifest may name.
DATATYPES = {"float32": "FP32", "float64": "FP64", "int32": "INT32", "int64": "INT64", "bool": "BOOL"}
_SIZES = {"FP32": 4, "FP64": 8, "INT32": 4, "INT64": 8, "BOOL": 1}
_LENGTH = struct.Struct("<I")


def takes_bytes(spec: InputSpec) -> bool:
    """Whether a row is a file, such as an encoded image, and not numbers."""
    return spec.kind != "tensor"


def input_datatype(spec: InputSpec) -> str:
    """The datatype that a model's input has in its metadata."""
    return "BYTES" if takes_bytes(spec) else DATATYPES[spec.dtype]


def parameters(holder: dict[str, Any], whose: str) -> dict[str, Any]:
    """The parameters of a request or of one of its tensors. Raises BadRequest."""
    found = holder.get("parameters", {})
    if type(found) is not dict:
        raise BadRequest(f"the parameters of {whose} must be an object")
    if "shared_memory_region" in found:
        raise BadRequest("shared memory isn't offered; tensors travel in the bodies")
    return found


def read_input(tensor: dict[str, Any], rest: bytes | memoryview, spec: InputSpec, max_rows: int) -> Any:
    """The rows that an input tensor holds: a list, or a tensor of shape [rows, …].

    ``rest`` is what follows the JSON in the body; all of it belongs to this tensor. Raises BadRequest.
    """
    shape, datatype, size = tensor.get("shape"), tensor.get("datatype"), _binary_size(tensor)
    wanted, row = _expected(spec, datatype)
    if type(shape) is not list or shape[1:] != row or not shape or not all(_is_size(number) for number in shape):
        raise BadRequest(f"input must have the shape [rows{''.join(f', {number}' for number in row)}]")
    check_count(shape[0], max_rows)
    if size is None:
        if len(rest):
            raise BadRequest("bytes follow the JSON, but no input has the parameter binary_data_size")
        return _read_json(tensor, shape, spec, wanted, max_rows)
    if "data" in tensor:
        raise BadRequest("input has both data and the parameter binary_data_size")
    if size != len(rest):
        raise BadRequest(f"binary_data_size must be the number of bytes after the JSON, {len(rest)}")
    return _read_strings(rest, shape[0]) if wanted == "BYTES" else _read_numbers(rest, shape, wanted)


def _expected(spec: InputSpec, datatype: Any) -> tuple[str, list[int]]:
    """The datatype and the shape of one row."""
    wanted = input_datatype(spec)
    if datatype == wanted:
        return wanted, [] if takes_bytes(spec) else list(spec.shape)
    # Pixels instead of an encoded image.
    if spec.kind == "image" and datatype == "FP32":
        return "FP32", list(spec.shape)
    also = " or FP32" if spec.kind == "image" else ""
    raise BadRequest(f"input must have the datatype {wanted}{also}")


def _is_size(number: Any) -> bool:
    return type(number) is int and number >= 0


def _binary_size(tensor: dict[str, Any]) -> int | None:
    found = parameters(tensor, "an input")
    size = found.get("binary_data_size")
    if "binary_data_size" in found and not _is_size(size):
        raise BadRequest("binary_data_size must be a whole number from 0")
    return size


def _read_json(tensor: dict[str, Any], shape: list[int], spec: InputSpec, datatype: str, max_rows: int) -> Any:
    data = tensor.get("data")
    if type(data) is not list:
        raise BadRequest("input must have data, a list, or the parameter binary_data_size")
    pixels = datatype != "BYTES" and takes_bytes(spec)
    numbers = TensorSpec(tuple(shape[1:]), "float32") if pixels else spec
    rows = numbers.rows(_nested(data, shape), max_rows)
    if rows.single or len(rows.values) != shape[0]:
        raise BadRequest("data doesn't have as many elements as shape says")
    if not pixels:
        return rows.values
    import torch

    return torch.tensor(rows.values, dtype=torch.float32)


def _nested(data: list[Any], shape: list[int]) -> list[Any]:
    """``data`` as nested lists; it may also have come as one flat list, in row-major order."""
    if len(shape) == 1 or (data and type(data[0]) is list):
        return data
    if len(data) != math.prod(shape):
        raise BadRequest("data doesn't have as many elements as shape says")
    for size in reversed(shape[1:]):
        data = [data[start : start + size] for start in range(0, len(data), size)]
    return data


def _read_numbers(raw: bytes | memoryview, shape: list[int], datatype: str) -> "torch.Tensor":
    import torch

    if len(raw) != math.prod(shape) * _SIZES[datatype]:
        raise BadRequest(f"binary_data_size doesn't fit the shape and the datatype {datatype}")
    types = {"FP32": torch.float32, "FP64": torch.float64, "INT32": torch.int32, "INT64": torch.int64}
    # A copy: memory of the tensor's own, aligned, that may be written to.
    tensor = torch.frombuffer(bytearray(raw), dtype=types.get(datatype, torch.uint8)).reshape(shape)
    if datatype == "BOOL":
        if tensor.max() > 1:
            raise BadRequest("the bytes of a BOOL tensor must be 0 or 1")
        return tensor.bool()
    if tensor.is_floating_point() and not _is_finite(tensor):
        raise BadRequest("input holds a number that isn't finite")
    return tensor


def _is_finite(tensor: "torch.Tensor") -> bool:
    # Only finite numbers have a finite sum, which costs a fortieth of looking at each; large ones may have none either.
    return bool(tensor.sum().isfinite()) or bool(tensor.isfinite().all())


def _read_strings(raw: bytes | memoryview, count: int) -> list[bytes]:
    strings, start = [], 0
    while start < len(raw):
        end = start + _LENGTH.size
        if end > len(raw) or len(strings) == count:
            raise BadRequest("input doesn't have as many BYTES elements as shape says")
        start, end = end, end + _LENGTH.unpack_from(raw, start)[0]
        if end > len(raw):
            raise BadRequest("a BYTES element of input is longer than what was sent")
        strings.append(bytes(raw[start:end]))
        start = end
    if len(strings) != count:
        raise BadRequest("input doesn't have as many BYTES elements as shape says")
    return strings


@dataclass(frozen=True)
class Output:
    """The output tensor of one request. ``elements`` are strings where the datatype is BYTES, else a tensor."""

    datatype: str
    shape: list[int]
    elements: Any

    @classmethod
    def of(cls, values: Any) -> "Output":
        """Of a tensor of shape [rows, …], or of a list with one JSON value for each row.

        Of a list, numbers become FP64, truth values BOOL, and everything else BYTES: strings, and JSON of the rest.
        """
        tensor = _as_tensor(values) if isinstance(values, list) else values
        if tensor is not None:
            return cls(DATATYPES[str(tensor.dtype).removeprefix("torch.")], list(tensor.shape), tensor)
        strings = [value.encode() if isinstance(value, str) else to_json(value) for value in values]
        return cls("BYTES", [len(strings)], strings)

    def listed(self) -> list[Any]:
        """The elements for JSON: flat, in row-major order."""
        if self.datatype == "BYTES":
            return [string.decode() for string in self.elements]
        return self.elements.flatten().tolist()

    def raw(self) -> bytes:
        """The elements for the binary extension."""
        if self.datatype == "BYTES":
            return b"".join(part for string in self.elements for part in (_LENGTH.pack(len(string)), string))
        return self.elements.contiguous().numpy().tobytes()


def _as_tensor(values: list[Any]) -> "torch.Tensor | None":
    import torch

    try:
        return torch.tensor(values, dtype=torch.bool if set(map(type, values)) == {bool} else torch.float64)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
