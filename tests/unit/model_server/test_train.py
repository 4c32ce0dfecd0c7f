"""The shipped bundles are what the script makes, but for rounding: they were made in float32."""

import json
import os
import subprocess
import sys

from bundle_making import SHIPPED
from model_server.payload import same


def test_training_reproduces_the_shipped_bundles(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, SHIPPED / "train.py", tmp_path], check=True, capture_output=True, env=environment)
    for version in ("1.0.0", "1.1.0"):
        made, shipped = (
            json.loads((folder / version / "examples.json").read_text())["examples"] for folder in (tmp_path, SHIPPED)
        )
        assert len(made) == len(shipped)
        for left, right in zip(made, shipped, strict=True):
            assert left["request"] == right["request"]
            assert same(right["response"], left["response"], 2 * right["tolerance"])
