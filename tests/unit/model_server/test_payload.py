"""Requests that are refused, requests that aren't, and how answers are compared."""

import pytest
from model_server.payload import BadRequest, NotFinite, TensorSpec, UnusableOutput, parse, render, same

PAIR = TensorSpec((2,), "float32")


def test_one_row_and_many_rows():
    one, many = parse(b'{"data":[0.2,1]}', PAIR, 3), parse(b'{"data":[[1,2],[3,4]]}', PAIR, 3)
    assert (one.values, one.single) == ([[0.2, 1]], True)
    assert (many.values, many.single) == ([[1, 2], [3, 4]], False)


@pytest.mark.parametrize(
    ("shape", "data", "rows", "single"),
    [
        ((), "1", 1, True),
        ((), "[1, 2]", 2, False),
        ((1, 2), "[[1, 2]]", 1, True),
        ((1, 2), "[[[1, 2]], [[3, 4]]]", 2, False),
    ],
)
def test_other_shapes(shape, data, rows, single):
    found = parse(f'{{"data": {data}}}'.encode(), TensorSpec(shape, "float32"), 3)
    assert (len(found.values), found.single) == (rows, single)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"", "empty"),
        (b"{", "not JSON"),
        (b"\xff\xfe\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"data": ' + b"9" * 10_000 + b"}", "not JSON"),
        (b"[0.2, 0.6]", "JSON object"),
        (b'{"date": [0.2, 0.6]}', '"data"'),
        (b'{"data": NaN}', "NaN"),
        (b'{"data": [0.2, Infinity]}', "Infinity"),
        (b'{"data": [0.2, -Infinity]}', "-Infinity"),
        (b'{"data": [0.2, 1e999]}', "out of range"),
        (b'{"data": [0.2, 1e39]}', "data[1] is out of the range"),
        (b'{"data": []}', "2 elements, not 0"),
        (b'{"data": [[]]}', "data[0] must have 2 elements"),
        (b'{"data": null}', "one row"),
        (b'{"data": 0.2}', "one row"),
        (b'{"data": "0.2,0.6"}', "one row"),
        (b'{"data": {"x1": 1}}', "one row"),
        (b'{"data": [[[0.2, 0.6]]]}', "one row"),
        (b'{"data": [0.2]}', "2 elements, not 1"),
        (b'{"data": [0.2, 0.6, 1]}', "2 elements, not 3"),
        (b'{"data": [[1, 2], [3]]}', "data[1] must have 2 elements"),
        (b'{"data": [[1, 2], 3]}', "data[1] must be a list"),
        (b'{"data": [1, [2, 3]]}', "data[1] must be a number, not a list"),
        (b'{"data": [true, 1]}', "data[0] must be a number, not a boolean"),
        (b'{"data": ["1", 1]}', "data[0] must be a number, not a string"),
        (b'{"data": [[1, 2], [1, null]]}', "data[1][1] must be a number, not null"),
        (b'{"data": [1, {}]}', "data[1] must be a number, not an object"),
        (b'{"data": [[1,2],[1,2],[1,2],[1,2]]}', "4 rows; this model takes at most 3"),
    ],
)
def test_refused(body, words):
    with pytest.raises(BadRequest) as caught:
        parse(body, PAIR, 3)
    assert words in str(caught.value)


def test_no_rows_of_a_scalar():
    with pytest.raises(BadRequest, match="no rows"):
        parse(b'{"data": []}', TensorSpec((), "float32"), 3)


@pytest.mark.parametrize(
    ("dtype", "good", "bad"),
    [("int64", "3", "3.0"), ("int32", "-5", "2147483648"), ("bool", "true", "1"), ("float64", "1e300", "true")],
)
def test_types(dtype, good, bad):
    spec = TensorSpec((1,), dtype)
    parse(f'{{"data": [{good}]}}'.encode(), spec, 1)
    with pytest.raises(BadRequest):
        parse(f'{{"data": [{bad}]}}'.encode(), spec, 1)


def test_render():
    assert render([0.5], True) == b'{"output":0.5}'
    assert render([0.5], False) == b'{"output":[0.5]}'
    for value in (float("nan"), [float("inf")]):
        with pytest.raises(NotFinite):
            render([value], True)
    endless: list = []
    endless.append(endless)
    for value in (object(), endless):
        with pytest.raises(UnusableOutput) as caught:
            render([value], True)
        assert caught.type is UnusableOutput


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ({"a": [1, 2.0]}, {"a": [1.05, 2]}, True),
        (1, 1.2, False),
        (1, True, False),
        ("x", "x", True),
        ([1], [1, 1], False),
        ({"a": 1}, {"b": 1}, False),
        (None, None, True),
        (None, 0, False),
    ],
)
def test_same(left, right, expected):
    assert same(left, right, 0.1) is expected
