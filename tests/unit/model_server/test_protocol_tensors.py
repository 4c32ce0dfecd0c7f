"""Whatever a client sends as tensors is either read exactly or refused as the client's fault."""

import json
import struct
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from model_server.bodies import BytesSpec
from model_server.core import Call, Models, Refusal, Request
from model_server.images import ImageSpec
from model_server.payload import BadRequest, TensorSpec
from model_server.protocols import oip, tensors

PATH = {"name": "model"}
OUTPUT = TensorSpec((1,), "float32")
SPECS = [
    TensorSpec((2,), "float32"),
    TensorSpec((2, 1), "float64"),
    TensorSpec((), "int64"),
    TensorSpec((3,), "int32"),
    TensorSpec((2,), "bool"),
    ImageSpec(2, 2, 1, (0.5,), (0.5,)),
    BytesSpec(),
]
TYPES = {"float32": "f", "float64": "d", "int32": "i", "int64": "q", "bool": "?"}


def begin(spec: object, body: bytes, length: object = None) -> Call:
    bundle = SimpleNamespace(input=spec, output=OUTPUT, max_rows=4)
    models = Models([SimpleNamespace(name="model", version="1", bundle=bundle, module=None)])
    headers = {} if length is None else {"INFERENCE_HEADER_CONTENT_LENGTH": str(length)}
    return oip.routes(models)[0].begin(Request("POST", "/", headers, body), PATH)


def body_of(header: dict, raw: bytes) -> tuple[bytes, int]:
    text = json.dumps(header).encode()
    return text + raw, len(text)


def request(shape: object, datatype: object, raw: bytes | None = None, **more: object) -> tuple[bytes, int]:
    tensor = {"name": "input", "shape": shape, "datatype": datatype, **more}
    if raw is not None:
        tensor.setdefault("parameters", {"binary_data_size": len(raw)})
    return body_of({"inputs": [tensor]}, raw or b"")


@given(data=st.data(), spec=st.sampled_from(SPECS[:5]), rows=st.integers(1, 4))
def test_numbers_arrive_as_they_were_sent(data, spec, rows):
    kind = TYPES[spec.dtype]
    number = {
        "f": st.floats(width=32, allow_nan=False, allow_infinity=False),
        "d": st.floats(allow_nan=False, allow_infinity=False),
        "i": st.integers(-(2**31), 2**31 - 1),
        "q": st.integers(-(2**63), 2**63 - 1),
        "?": st.booleans(),
    }[kind]
    shape = [rows, *spec.shape]
    count = torch.Size(shape).numel()
    numbers = data.draw(st.lists(number, min_size=count, max_size=count))
    datatype = {"f": "FP32", "d": "FP64", "i": "INT32", "q": "INT64", "?": "BOOL"}[kind]
    by_bytes = begin(spec, *request(shape, datatype, struct.pack(f"<{count}{kind}", *numbers))).rows
    assert by_bytes.dtype == getattr(torch, spec.dtype) and list(by_bytes.shape) == shape
    assert by_bytes.flatten().tolist() == numbers
    by_json = begin(spec, request(shape, datatype, data=numbers)[0]).rows
    assert torch.tensor(by_json, dtype=by_bytes.dtype).tolist() == by_bytes.tolist()


@given(strings=st.lists(st.binary(max_size=20), min_size=1, max_size=4))
def test_strings_arrive_as_they_were_sent(strings):
    raw = b"".join(struct.pack("<I", len(string)) + string for string in strings)
    assert begin(BytesSpec(), *request([len(strings)], "BYTES", raw)).rows == strings


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**70) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from(
    ["name", "shape", "datatype", "parameters", "data", "inputs", "outputs", "id", "binary_data_size", "timeout"]
    + ["binary_data_output", "binary_data", "classification", "shared_memory_region"]
)
DATATYPES = st.sampled_from(["FP32", "FP64", "INT32", "INT64", "BOOL", "BYTES", "FP16", "BF16", "UINT8"])


@st.composite
def mangled(draw) -> dict:
    """A request that is nearly right: some members are replaced by anything, others added or left out."""
    parameters = draw(st.dictionaries(KEYS, st.integers(-1, 40) | JSON_VALUES, max_size=2))
    tensor = {
        "name": "input",
        "shape": draw(st.lists(st.integers(-1, 5) | st.just(2**64), max_size=4)),
        "datatype": draw(DATATYPES),
        "parameters": {**parameters, "binary_data_size": draw(st.integers(0, 40))},
        "data": draw(st.lists(st.integers(0, 1) | st.floats() | st.text(max_size=4), max_size=8)),
    }
    request = {"inputs": [tensor], "outputs": [{"name": "output", "parameters": parameters}], "parameters": parameters}
    for holder in (tensor, request):
        for key in draw(st.lists(KEYS, max_size=3)):
            if draw(st.booleans()):
                holder.pop(key, None)
            else:
                holder[key] = draw(JSON_VALUES)
    return request


def answers_or_refuses(spec: object, body: bytes, length: object) -> None:
    try:
        call = begin(spec, body, length)
    except BadRequest:
        return
    except Refusal as refusal:
        assert refusal.status == 400
        return
    assert 1 <= len(call.rows) <= 4
    assert call.seconds is None or 0 < call.seconds <= 3600


@settings(max_examples=300)
@given(spec=st.sampled_from(SPECS), header=mangled(), raw=st.binary(max_size=40), data=st.data())
def test_a_mangled_request_is_the_clients_fault(spec, header, raw, data):
    body, length = body_of(header, raw)
    answers_or_refuses(spec, body, data.draw(st.none() | st.just(length) | st.integers(-2, len(body) + 2)))


@given(spec=st.sampled_from(SPECS), body=st.binary(max_size=60), length=st.none() | st.text(max_size=25))
@example(spec=SPECS[0], body=b"[" * 5000, length=None)
@example(spec=SPECS[0], body=b"{}", length="2" * 5000)
@example(spec=SPECS[0], body=b"{}", length="\u0662")
def test_any_bytes_are_the_clients_fault(spec, body, length):
    answers_or_refuses(spec, body, length)


@given(raw=st.binary(max_size=30), rows=st.integers(1, 4))
def test_any_bytes_are_strings_or_refused(raw, rows):
    answers_or_refuses(BytesSpec(), *request([rows], "BYTES", raw))


ROW = struct.pack("<2f", 1, 2)


@pytest.mark.parametrize(
    ("shape", "datatype", "raw", "more", "message"),
    [
        ([1, 2], "FP32", ROW + b"\0", {}, "doesn't fit"),
        ([1, 2], "FP32", ROW, {"parameters": {"binary_data_size": 4}}, "after the JSON, 8"),
        ([1, 2], "FP32", ROW, {"parameters": {"binary_data_size": 8.0}}, "whole number"),
        ([1, 2], "FP32", ROW, {"parameters": {"binary_data_size": None}}, "whole number"),
        ([1, 2], "FP32", ROW, {"parameters": {}}, "no input has"),
        ([1, 2], "FP32", ROW, {"data": [1, 2]}, "both data"),
        ([2**62, 2], "FP32", ROW, {}, "at most 4"),
        ([1, 2.0], "FP32", ROW, {}, "shape"),
        ([True, 2], "FP32", ROW, {}, "shape"),
        ([2], "FP32", ROW, {}, "shape"),
        ([1, 2], "FP16", ROW[:4], {}, "datatype FP32"),
        ([1, 2], "BF16", ROW[:4], {}, "datatype FP32"),
        ([1, 2], "FP32", struct.pack("<2f", 1, float("inf")), {}, "finite"),
        ([1, 2], "FP32", struct.pack("<2f", float("-inf"), float("inf")), {}, "finite"),
        ([1, 2], "FP32", struct.pack("<2f", float("nan"), 3e38), {}, "finite"),
        ([1, 2], "FP32", None, {"data": [1]}, "as many elements"),
        ([1, 2], "FP32", None, {"data": [[1, 2], [3, 4]]}, "as many elements"),
        ([1, 2], "FP32", None, {"data": [1, "2"]}, "must be a number"),
        ([1, 2], "FP32", None, {"data": [1, 1e39]}, "out of the range"),
        ([1, 2], "FP32", None, {}, "must have data"),
    ],
)
def test_what_is_wrong_is_said(shape, datatype, raw, more, message):
    with pytest.raises(BadRequest, match=message):
        begin(SPECS[0], *request(shape, datatype, raw, **more))


def test_numbers_may_be_so_large_that_they_have_no_sum():
    largest = torch.finfo(torch.float32).max
    call = begin(SPECS[0], *request([2, 2], "FP32", struct.pack("<4f", *[largest] * 3, -largest)))
    assert call.rows.tolist() == [[largest, largest], [largest, -largest]]


def test_a_truth_value_is_0_or_1():
    with pytest.raises(BadRequest, match="0 or 1"):
        begin(SPECS[4], *request([1, 2], "BOOL", b"\x01\x02"))


@pytest.mark.parametrize("length", ["", "-1", "1.0", "10000", "0x2", " 2"])
def test_a_wrong_length_of_the_header_is_refused(length):
    with pytest.raises(BadRequest):
        begin(SPECS[0], request([1, 2], "FP32", ROW)[0], length)


@pytest.mark.parametrize(
    ("values", "datatype", "elements"),
    [
        ([True, False], "BOOL", [True, False]),
        ([True, 0.5], "FP64", [1.0, 0.5]),
        ([0.5, True], "FP64", [0.5, 1.0]),
        ([[1, 2], [3, 4]], "FP64", [1.0, 2.0, 3.0, 4.0]),
        ([True, None], "BYTES", ["true", "null"]),
        (["a", {"b": 1}], "BYTES", ["a", '{"b":1}']),
    ],
)
def test_json_values_become_a_tensor_that_holds_them(values, datatype, elements):
    output = tensors.Output.of(values)
    assert (output.datatype, output.listed()) == (datatype, elements)
