"""Bundles that only the benchmarks need: a slow model, and a large one."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

_SLOW = '''"""A model that keeps its core busy for a while, whatever it is asked."""

import torch


class Slow(torch.nn.Module):
    """Maps float32 of shape [rows, 2] to float32 of shape [rows, 1], after `turns` products of square matrices."""

    def __init__(self, turns: int) -> None:
        super().__init__()
        self.turns = turns
        self.layer = torch.nn.Linear(2, 1)
        self.register_buffer("square", torch.eye(256))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        product = self.square
        for _ in range(self.turns):
            product = product @ self.square
        return self.layer(rows) * product[0, 0]
'''
_LARGE = '''"""A model with many weights, all of which each prediction reads."""

import torch


class Large(torch.nn.Module):
    """Maps float32 of shape [rows, 2] to float32 of shape [rows, 1] through `layers` layers of 4 MB."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        inner = [torch.nn.Linear(1024, 1024, bias=False) for _ in range(layers)]
        self.layers = torch.nn.Sequential(torch.nn.Linear(2, 1024), *inner, torch.nn.Linear(1024, 1))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.layers(rows)
'''
# Of one layer of the large model.
_LAYER_MIB = 4


def make_slow(folder: Path, seconds: float) -> Path:
    """A bundle whose model takes about `seconds` of one core for a batch, which is one row."""
    return _make(folder, "slow", _SLOW, "Slow", {"turns": _turns(seconds)}, max_rows=1)


def make_large(folder: Path, mib: int) -> Path:
    """A bundle with `mib` MiB of weights."""
    return _make(folder, "large", _LARGE, "Large", {"layers": mib // _LAYER_MIB}, max_rows=8)


def _turns(seconds: float) -> int:
    torch.set_num_threads(1)
    square, turns = torch.eye(256), 200
    fastest = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(turns):
            square @ square
        fastest = min(fastest, time.perf_counter() - started)
    return max(1, round(seconds / (fastest / turns)))


def _make(folder: Path, name: str, code: str, entry: str, arguments: Mapping[str, Any], max_rows: int) -> Path:
    bundle = folder / name
    bundle.mkdir()
    scope: dict[str, Any] = {"__name__": name}
    exec(compile(code, "model.py", "exec"), scope)
    torch.manual_seed(0)
    model = scope[entry](**arguments).eval()
    row = [0.2, 0.6]
    with torch.inference_mode():
        answer = model(torch.tensor([row])).item()
    manifest = {
        "name": name,
        "version": "1.0.0",
        "description": "Made by a benchmark.",
        "entry": {"file": "model.py", "class": entry, "arguments": dict(arguments)},
        "weights": "weights.pth",
        "input": {"shape": [2], "dtype": "float32"},
        "output": {"shape": [1], "dtype": "float32"},
        "batching": {"max_rows": max_rows},
    }
    example = {"request": {"data": row}, "response": {"output": answer}, "tolerance": 1e-4}
    (bundle / "model.py").write_text(code)
    torch.save(model.state_dict(), bundle / "weights.pth")
    (bundle / "manifest.yaml").write_text(yaml.safe_dump(manifest))
    (bundle / "examples.json").write_text(json.dumps({"examples": [example]}))
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in sorted(bundle.iterdir())]
    (bundle / "SHA256SUMS").write_text("".join(sums))
    return bundle
