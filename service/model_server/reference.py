"""The rows that a model was trained on, feature by feature: what its live inputs are compared with.

A bundle's ``reference.json`` is written once, from the training rows, and never changes with what is served.
"""

import bisect
import hashlib
import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

FILE = "reference.json"
# Each costs a scrape some thirty series.
MOST_FEATURES = 100
BINS = 10

_LONGEST_NAME = 100
# What is written with fewer digits than it was computed with is still a share.
_SHARES_TOLERANCE = 1e-6


@dataclass(frozen=True)
class Feature:
    """One feature's training values.

    ``center`` and ``scale`` are what deviations of live values are counted by: ``(value - center) / scale``. Bin ``i``
    holds the values from ``edges[i - 1]``, which is in it, to ``edges[i]``, which isn't; ``ratios`` are the shares of
    the training values in the bins. A constant has ``scale`` 1, ``std`` 0 and no bins.
    """

    name: str
    center: float
    scale: float
    mean: float
    std: float
    edges: tuple[float, ...]
    ratios: tuple[float, ...]
    minimum: float
    maximum: float


@dataclass(frozen=True)
class Reference:
    """``count`` is the number of training rows; ``digest`` tells one reference from another."""

    count: int
    features: tuple[Feature, ...]
    digest: str


def parse(data: bytes) -> Reference:
    """Read a ``reference.json``. Raises ValueError, which names the field."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"is not JSON: {error}") from None
    top = _Fields(document, "", ("count", "features"))
    listed = top.take("features")
    if not isinstance(listed, list) or not 1 <= len(listed) <= MOST_FEATURES:
        raise top.fail("features", _short(listed), f"a list of 1 to {MOST_FEATURES} features")
    features = tuple(_feature(item, f"features[{index}]") for index, item in enumerate(listed))
    names = [feature.name for feature in features]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"features: the name {name!r} is there twice; each feature needs one of its own")
    return Reference(top.whole("count"), features, hashlib.sha256(data).hexdigest()[:12])


def measure(columns: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """The document of ``reference.json`` for training values by feature, all of the same length.

    NaN is a value that is missing. Raises ValueError, which names the feature.
    """
    features = [asdict(_measured(name, values)) for name, values in columns.items()]
    return {"count": len(next(iter(columns.values()))), "features": features}


def to_text(document: dict[str, Any]) -> str:
    """What ``reference.json`` holds: one line for each feature."""
    features = ",\n  ".join(json.dumps(feature) for feature in document["features"])
    return f'{{"count": {document["count"]}, "features": [\n  {features}\n]}}\n'


def _measured(name: str, values: Sequence[float]) -> Feature:
    found = sorted(value for value in values if not math.isnan(value))
    if not found:
        raise ValueError(f"{name} has no value in any row")
    low, high, count = found[0], found[-1], len(found)
    if math.isinf(low) or math.isinf(high):
        raise ValueError(f"{name} holds an infinite number; leave such rows out, or their values empty")
    if low == high:
        return Feature(name, low, 1.0, low, 0.0, (), (), low, high)
    try:
        mean = math.fsum(found) / count
        std = math.sqrt(math.fsum((value - mean) ** 2 for value in found) / (count - 1))
    except OverflowError:
        raise ValueError(f"{name} holds numbers that are too large for a variance") from None
    cuts = _cuts(found)
    ratios = tuple((end - start) / count for start, end in zip((0, *cuts), (*cuts, count), strict=True))
    edges = tuple(_between(found[cut - 1], found[cut]) for cut in cuts)
    # Squares of the smallest differences are 0.
    std = max(std, sys.float_info.min)
    return Feature(name, mean, std, mean, std, edges, ratios, low, high)


def _cuts(found: list[float]) -> list[int]:
    """Where sorted values are cut into bins: next to each decile, but never between equal values."""
    cuts = set()
    for tenth in range(1, BINS):
        wanted = len(found) * tenth // BINS
        sides = (bisect.bisect_left(found, found[wanted]), bisect.bisect_right(found, found[wanted]))
        # At an end there's nothing to cut off.
        cuts.add(min((side for side in sides if 0 < side < len(found)), key=lambda side: abs(side - wanted)))
    return sorted(cuts)


def _between(low: float, high: float) -> float:
    """In the middle, so that values which are rounded elsewhere stay on their side."""
    middle = low + (high - low) / 2
    return middle if low < middle <= high else high


def _feature(document: Any, where: str) -> Feature:
    fields = _Fields(document, where, tuple(Feature.__annotations__))
    name = fields.take("name")
    if not isinstance(name, str) or not 0 < len(name) <= _LONGEST_NAME:
        raise fields.fail("name", _short(name), f"text of 1 to {_LONGEST_NAME} characters")
    feature = Feature(
        name=name,
        center=fields.number("center"),
        scale=fields.number("scale", above=0),
        mean=fields.number("mean"),
        std=fields.number("std", least=0),
        edges=fields.numbers("edges", BINS - 1),
        ratios=fields.numbers("ratios", BINS),
        minimum=fields.number("minimum"),
        maximum=fields.number("maximum"),
    )
    edges, ratios = feature.edges, feature.ratios
    if list(edges) != sorted(set(edges)):
        raise fields.fail("edges", _short(list(edges)), "a list of rising numbers")
    if (feature.std > 0) is not bool(edges):
        raise fields.fail("edges", _short(list(edges)), "empty where std is 0, and else not")
    if len(ratios) != (len(edges) + 1 if edges else 0):
        raise fields.fail("ratios", _short(list(ratios)), f"a list of {len(edges) + 1 if edges else 0} shares")
    if ratios and not (min(ratios) > 0 and abs(sum(ratios) - 1) <= _SHARES_TOLERANCE):
        raise fields.fail("ratios", _short(list(ratios)), "shares above 0 with the sum 1")
    if feature.minimum > feature.maximum:
        raise fields.fail("minimum", feature.minimum, f"at most maximum, {feature.maximum}")
    return feature


class _Fields:
    """One object of the document, which has exactly the fields ``names``."""

    def __init__(self, document: Any, where: str, names: tuple[str, ...]) -> None:
        self._where = where
        if not isinstance(document, dict):
            raise ValueError(f"{where or 'the document'} must be an object")
        for name in names:
            if name not in document:
                raise ValueError(f"{self._path(name)} is missing")
        for name in document.keys() - set(names):
            raise ValueError(f"{self._path(name)} is not a known field")
        self._document = document

    def _path(self, name: str) -> str:
        return f"{self._where}.{name}" if self._where else name

    def fail(self, name: str, value: Any, wanted: str) -> ValueError:
        return ValueError(f"{self._path(name)} is {value!r}; it must be {wanted}")

    def take(self, name: str) -> Any:
        return self._document[name]

    def whole(self, name: str) -> int:
        value = self.take(name)
        if type(value) is not int or value < 1:
            raise self.fail(name, value, "a whole number from 1")
        return value

    def number(self, name: str, *, above: float = -math.inf, least: float = -math.inf) -> float:
        value = self.take(name)
        if not _is_finite(value) or value <= above or value < least:
            limit = f" above {above}" if above > -math.inf else f" from {least}" if least > -math.inf else ""
            raise self.fail(name, value, f"a finite number{limit}")
        return float(value)

    def numbers(self, name: str, most: int) -> tuple[float, ...]:
        values = self.take(name)
        if not isinstance(values, list) or len(values) > most or not all(map(_is_finite, values)):
            raise self.fail(name, _short(values), f"a list of at most {most} finite numbers")
        return tuple(map(float, values))


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max


def _short(value: Any) -> Any:
    """A value for a message; of a long one, what it is."""
    return value if len(repr(value)) <= 200 else f"{type(value).__name__} of {len(value)}"
