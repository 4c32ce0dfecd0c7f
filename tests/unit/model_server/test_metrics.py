"""What is exported of a bundle."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from model_server import bundle as bundles
from model_server.metrics import Exporter
from model_server.state import SharedState


@pytest.fixture
def several(bundle_dir: Path) -> bundles.Bundle:
    """A bundle of two models."""
    first = replace(bundles.read(bundle_dir), name="first-one", metrics={"accuracy": 0.5, "loss": 2.0})
    second = replace(first, name="second", version="3", metrics={"accuracy": 0.75, "loss": 4.0})
    return replace(first, name="pair", version="2", digest="sha256:1", parts=(first, second))


def test_each_model_of_a_bundle_is_exported(several, tmp_path):
    config = SimpleNamespace(colour="blue", jobs=None, queue_limit=8)
    lines = Exporter(str(tmp_path), config, several, SharedState(1)).text().decode().splitlines()
    of_bundle = 'bundle="pair",bundle_digest="sha256:1",bundle_version="2"'
    assert [line for line in lines if line.startswith(("acc_", "model_training_metric", "model_info"))] == [
        "acc_first_one 0.5",
        "acc_second 0.75",
        f'model_info{{{of_bundle},model="first-one",version="1.0.0"}} 1.0',
        f'model_info{{{of_bundle},model="second",version="3"}} 1.0',
        'model_training_metric{metric="loss",model="first-one"} 2.0',
        'model_training_metric{metric="loss",model="second"} 4.0',
    ]
