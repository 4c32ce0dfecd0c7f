"""One message of the topic: a training row."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

OK = "ok"
MALFORMED = "malformed"
SCHEMA = "schema"
MISSING = "missing"
STATUSES = (OK, MALFORMED, SCHEMA, MISSING)
# A model's tensors hold nothing larger, and its square would spoil a sum for good.
_LARGEST = 3.4028234663852886e38


def parse(message: bytes | None, names: Sequence[str]) -> tuple[str, list[float] | None]:
    """The status of a message, and its values in the order of `names`; None instead where it isn't such a row.

    A row is `{"features": {"x1": 0.2, …}}` or `{"data": [0.2, …]}`; further keys don't matter. `malformed` is what
    isn't a row at all, `schema` a row of other features than `names`, `missing` one of whose values is null or no
    finite float32: that value is NaN, the others count.
    """
    try:
        row = json.loads(message or b"")
    except (ValueError, RecursionError):
        return MALFORMED, None
    if not isinstance(row, dict):
        return MALFORMED, None
    features, data = row.get("features"), row.get("data")
    if isinstance(features, dict) and data is None:
        if features.keys() != set(names):
            return SCHEMA, None
        raw = [features[name] for name in names]
    elif isinstance(data, list) and features is None:
        if len(data) != len(names):
            return SCHEMA, None
        raw = data
    else:
        return MALFORMED, None
    if not all(map(_is_value, raw)):
        return SCHEMA, None
    values = [float(value) if _is_usable(value) else math.nan for value in raw]
    return (MISSING if any(map(math.isnan, values)) else OK), values


def _is_value(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def _is_usable(value: float | None) -> bool:
    # Also false for NaN.
    return value is not None and -_LARGEST <= value <= _LARGEST
