"""Two versions of a bundle for mixed load: a quick model, and one that sleeps for as long as a request asks.

The quick one runs in a worker's loop and the sleeper in its thread, so that nobody waits for those who sleep. The same
bytes come out at each call, for a bundle that has been delivered never changes.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

NAME = "mixed-load"
# What the quick model makes of a sum, by version.
FACTORS = {"1.0.0": 1.0, "1.1.0": 2.0}
QUICK_PATH = "/predict"
SLEEPER_PATH = "/v1/model/sleeper/predict"

_QUICK = '''"""Adds two numbers."""

import torch


class Quick(torch.nn.Module):
    """Maps float32 of shape [rows, 2] to `factor` times each row's sum, float32 of shape [rows, 1]."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.factor * rows.sum(1, keepdim=True)
'''
_SLEEPER = '''"""Sleeps for as long as it is asked to, and answers for how long that was."""

import time

import torch


class Sleeper(torch.nn.Module):
    """Maps seconds, float32 of shape [rows, 1], to themselves. A batch sleeps as long as its longest row, up to 5 s."""

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        # Never so short that a worker would run it in its loop, where everybody else would wait for it.
        time.sleep(min(5.0, max(0.01, rows.max().item())))
        return rows
'''


def write_bundle(folder: Path, version: str) -> Path:
    """Write the bundle of that version into a new directory of `folder`."""
    bundle = folder / f"{NAME}-{version}"
    row = [0.2, 0.6]
    quick = {"entry": {"file": "model.py", "class": "Quick", "arguments": {"factor": FACTORS[version]}}}
    quick_example = {"request": {"data": row}, "response": {"output": FACTORS[version] * sum(row)}, "tolerance": 1e-4}
    sleeper = {"entry": {"file": "model.py", "class": "Sleeper"}}
    sleeper_example = {"request": {"data": [0.0]}, "response": {"output": 0.0}, "tolerance": 0.0}
    _write(bundle / "quick", version, quick | _numbers(2), quick_example, _QUICK)
    _write(bundle / "sleeper", version, sleeper | _numbers(1), sleeper_example, _SLEEPER)
    _write(bundle, version, {"name": NAME, "models": ["quick", "sleeper"]}, quick_example)
    return bundle


def _numbers(columns: int) -> dict[str, Any]:
    return {
        "input": {"shape": [columns], "dtype": "float32"},
        "output": {"shape": [1], "dtype": "float32"},
        "batching": {"max_rows": 64},
    }


def _write(directory: Path, version: str, fields: dict[str, Any], example: dict[str, Any], code: str = "") -> None:
    directory.mkdir(parents=True, exist_ok=True)
    manifest = {"name": directory.name, "version": version, "description": "Made for a benchmark.", **fields}
    (directory / "manifest.yaml").write_text(yaml.safe_dump(manifest, sort_keys=False))
    (directory / "examples.json").write_text(json.dumps({"examples": [example]}, indent=1) + "\n")
    if code:
        (directory / "model.py").write_text(code)
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path != directory / "SHA256SUMS")
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(directory)}\n" for path in files]
    (directory / "SHA256SUMS").write_text("".join(sums))
