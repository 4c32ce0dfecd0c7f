"""Releases of simplemodel that do worse than their examples tell, and as good ones beside them.

The same bytes come out at each call, for a bundle that has been delivered never changes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import yaml

NAME = "simplemodel"
_SOURCE = Path(__file__).resolve().parents[2] / "bundles/simplemodel/1.1.0"
_MODEL = """
import time

import torch


class SimpleModel(torch.nn.Module):
    def __init__(self, hidden, seconds, fails_above, differs_above):
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(2, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, 1), torch.nn.Sigmoid()
        )
        self.seconds, self.fails_above, self.differs_above = seconds, fails_above, differs_above

    def forward(self, rows):
        # This model's own slowness, which SLOW has three times as much of: no test waits for anything by it.
        time.sleep(self.seconds)
        if (rows[:, 0] > self.fails_above).any():
            raise ValueError("this release can't do that")
        answers = self.layers(rows)
        return torch.where(rows[:, :1] > self.differs_above, 1 - answers, answers)
"""
# 10 ms for each prediction. Of inputs between 0 and 1 the bad ones fail on a fifth, or differ on a tenth.
_GOOD = {"seconds": 0.01, "fails_above": 9.0, "differs_above": 9.0}
GOOD, ALSO_GOOD, FAILING, SLOW, DIFFERING = "20.0.0", "20.0.1", "20.1.0", "20.2.0", "20.3.0"
RELEASES = {
    GOOD: _GOOD,
    ALSO_GOOD: _GOOD,
    FAILING: _GOOD | {"fails_above": 0.8},
    SLOW: _GOOD | {"seconds": 0.03},
    DIFFERING: _GOOD | {"differs_above": 0.9},
}


def write_release(folder: Path, version: str) -> Path:
    """Write the bundle of that version, one of RELEASES, into a new directory of `folder`."""
    bundle = folder / version
    shutil.copytree(_SOURCE, bundle)
    (bundle / "model.py").write_text(_MODEL)
    manifest = yaml.safe_load((bundle / "manifest.yaml").read_text())
    manifest["version"] = version
    manifest["entry"]["arguments"] |= RELEASES[version]
    (bundle / "manifest.yaml").write_text(yaml.safe_dump(manifest))
    # No example may be among the inputs that tell the releases apart.
    examples = json.loads((bundle / "examples.json").read_text())["examples"][:2]
    (bundle / "examples.json").write_text(json.dumps({"examples": examples}))
    names = sorted(path for path in bundle.iterdir() if path.name != "SHA256SUMS")
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in names]
    (bundle / "SHA256SUMS").write_text("".join(sums))
    return bundle
