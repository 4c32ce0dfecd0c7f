"""A bundle's `reference.json`: what its model's features looked like in training."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any

from drift.errors import DriftError


@dataclass(frozen=True)
class Feature:
    """One feature. Bins begin with one of the ascending `edges` and end before the next; `ratios` are their shares.

    A constant has neither.
    """

    name: str
    mean: float
    std: float
    minimum: float
    maximum: float
    edges: tuple[float, ...]
    ratios: tuple[float, ...]


@dataclass(frozen=True)
class Reference:
    """The features in the order of the model's input. `digest` tells one reference from another."""

    digest: str
    features: tuple[Feature, ...]


def parse(content: bytes) -> Reference:
    """The reference in `content`. Raises DriftError."""
    try:
        features = json.loads(content)["features"]
        if not isinstance(features, list) or not features:
            raise DriftError("features must be a list that isn't empty")
        parsed = tuple(_feature(number, raw) for number, raw in enumerate(features))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DriftError(f"isn't a reference: {type(error).__name__}: {error}") from None
    if len({feature.name for feature in parsed}) < len(parsed):
        raise DriftError("features: two have the same name")
    return Reference(hashlib.sha256(content).hexdigest()[:12], parsed)


def _feature(number: int, raw: dict[str, Any]) -> Feature:
    name = raw["name"]
    if not isinstance(name, str) or not name:
        raise DriftError(f"features[{number}].name is {name!r}: it must be a text")
    numbers = {key: _number(name, key, raw[key]) for key in ("mean", "std", "minimum", "maximum")}
    edges = tuple(_number(name, "edges", edge) for edge in raw["edges"])
    ratios = tuple(_number(name, "ratios", ratio) for ratio in raw["ratios"])
    if list(edges) != sorted(edges):
        raise DriftError(f"feature {name}: edges must ascend")
    bins = len(edges) + 1 if edges else 0
    if len(ratios) != bins:
        raise DriftError(f"feature {name}: {len(edges)} edges need {bins} ratios, not {len(ratios)}")
    return Feature(name=name, edges=edges, ratios=ratios, **numbers)


def _number(name: str, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DriftError(f"feature {name}: {key} holds {value!r}, which isn't a finite number")
    return float(value)
