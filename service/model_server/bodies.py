"""Rows that are bytes, and outputs that are any JSON."""

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from model_server.payload import BadRequest, Rows, check_count


@dataclass(frozen=True)
class BytesSpec:
    """A row is bytes of any length, in base64 where they travel in JSON."""

    kind = "bytes"
    shape: tuple[int, ...] = ()
    dtype: str = "bytes"

    def describe(self) -> str:
        """For messages."""
        return "bytes in base64"

    def rows(self, data: Any, max_rows: int) -> Rows:
        """One row, or a list of 1 to ``max_rows`` of them. Raises BadRequest."""
        single = isinstance(data, str)
        if not single and not isinstance(data, list):
            raise BadRequest("data must be a string, bytes in base64, or a list of such strings")
        listed = [data] if single else data
        check_count(len(listed), max_rows)
        return Rows([_decode(row, "data" if single else f"data[{i}]") for i, row in enumerate(listed)], single)

    def prepare(self, rows: Sequence[Any]) -> Sequence[Any]:
        """Nothing to do."""
        return rows

    def schema(self) -> dict[str, Any]:
        """The JSON schema of one row."""
        return {"type": "string", "contentEncoding": "base64"}


@dataclass(frozen=True)
class JsonSpec:
    """An output is whatever JSON value the model's ``postprocess`` makes of a row."""

    kind = "json"
    shape: tuple[int, ...] = ()
    dtype: str = "json"
    labels: tuple[str, ...] = ()

    def check(self, output: Any) -> None:
        """Always raises TypeError: nothing is promised that could be sent as a tensor."""
        raise TypeError("the manifest promises JSON, which has no tensor")

    def values(self, output: Any) -> list[Any]:
        """A tensor's numbers, row by row. Raises TypeError for anything else."""
        if not hasattr(output, "tolist") or not output.shape:
            raise TypeError(f"the model must return a tensor with a row for each row, not {type(output).__name__}")
        return output.tolist()

    def schema(self) -> dict[str, Any]:
        """The JSON schema of one row's value: anything."""
        return {}


def _decode(value: Any, where: str) -> bytes:
    if not isinstance(value, str):
        raise BadRequest(f"{where} must be a string, bytes in base64")
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError):
        raise BadRequest(f"{where} is not base64") from None
