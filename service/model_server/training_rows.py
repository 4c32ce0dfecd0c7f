"""Files of training rows: CSV, and NumPy's ``.npy``."""

import array
import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

_WORDS = {"": math.nan, "true": 1.0, "false": 0.0}

_Columns = dict[str, Sequence[float]]


def read(path: Path, features: Sequence[str], width: int, dtype: str) -> _Columns:
    """The values of each of ``width`` features by its name, as a model gets them whose numbers are of ``dtype``.

    The columns of a CSV file with a header are found by the names ``features``, and others left out. Without names,
    columns are taken in their order and called as the header has them, or ``x0``, ``x1`` … What is missing is NaN: an
    empty field, or ``nan``. Raises ValueError, which names the row and the column, and OSError.
    """
    columns = _of_array(path) if path.suffix == ".npy" else _of_csv(path, features)
    if len(columns) != width:
        raise ValueError(f"has {len(columns)} columns; the manifest's input has {width} features")
    # Whole numbers and truth values are in a model what they are here.
    rounded = (array.array("f", values) if dtype == "float32" else values for values in columns.values())
    return dict(zip(features or columns, rounded, strict=True))


def _of_array(path: Path) -> _Columns:
    # Not at the top: the service's other parts do without.
    import numpy

    rows = numpy.load(path, allow_pickle=False)
    if rows.ndim != 2 or rows.dtype.kind not in "fiub" or not len(rows):
        raise ValueError(f"holds {rows.dtype} of shape {list(rows.shape)}, not numbers of shape [rows, features]")
    return {f"x{index}": column.astype(float).tolist() for index, column in enumerate(rows.T)}


def _of_csv(path: Path, features: Sequence[str]) -> _Columns:
    with open(path, newline="", encoding="utf-8-sig") as file:
        lines = csv.reader(file)
        first = next(lines, None)
        if first is None:
            raise ValueError("is empty")
        try:
            values = [[_number(text)] for text in first]
        except ValueError:
            for name in features:
                if first.count(name) != 1:
                    raise ValueError(
                        f"names {first.count(name)} columns {name!r} in line 1; one is needed. It names "
                        f"{', '.join(map(repr, first[:20]))}{', …' if len(first) > 20 else ''}"
                    ) from None
            places = {name: first.index(name) for name in features or first}
            columns = {name: array.array("d") for name in places}
        else:
            places = {f"x{index}": index for index in range(len(first))}
            columns = {name: array.array("d", value) for name, value in zip(places, values, strict=True)}
        _fill(columns, places, lines)
    if not all(map(len, columns.values())):
        raise ValueError("has no rows")
    return columns


def _fill(columns: dict[str, array.array], places: dict[str, int], lines: Iterable[list[str]]) -> None:
    for number, line in enumerate(lines, 2):
        if not line:
            continue
        for name, place in places.items():
            try:
                columns[name].append(_number(line[place]))
            except IndexError:
                raise ValueError(f"line {number}: {name} is missing; the line has {len(line)} fields") from None
            except ValueError:
                text = line[place][:50]
                raise ValueError(f"line {number}: {name} is {text!r}; it must be a number, or empty") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        word = _WORDS.get(text.strip().lower())
        if word is None:
            raise
        return word
