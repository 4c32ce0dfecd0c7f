"""What is exported of a bundle."""

import time
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


def exported(bundle, directory: Path, *names: str, state: SharedState | None = None) -> list[str]:
    """The samples of the metrics with these names."""
    config = SimpleNamespace(colour="blue", jobs=None, queue_limit=8)
    lines = Exporter(str(directory), config, bundle, state or SharedState(1)).text().decode().splitlines()
    return [line for line in lines if line.startswith(names)]


def test_each_model_of_a_bundle_is_exported(several, tmp_path):
    of_bundle = 'bundle="pair",bundle_digest="sha256:1",bundle_version="2"'
    assert exported(several, tmp_path, "acc_", "model_training_metric", "model_info") == [
        "acc_first_one 0.5",
        "acc_second 0.75",
        f'model_info{{{of_bundle},model="first-one",version="1.0.0"}} 1.0',
        f'model_info{{{of_bundle},model="second",version="3"}} 1.0',
        'model_training_metric{metric="loss",model="first-one"} 2.0',
        'model_training_metric{metric="loss",model="second"} 4.0',
    ]


def test_accuracy_has_a_name_for_all_models_and_its_rows(several, tmp_path):
    first, second = several.parts
    first = replace(first, metrics={"accuracy": 0.5, "accuracy_samples": 2000.0})
    # In percent: no ratio.
    second = replace(second, metrics={"accuracy": 75.0})
    bundle = replace(several, parts=(first, second))
    assert exported(bundle, tmp_path, "acc_", "model_accuracy", "model_training") == [
        "acc_first_one 0.5",
        "acc_second 75.0",
        'model_accuracy_ratio{model="first-one"} 0.5',
        'model_accuracy_samples{model="first-one"} 2000.0',
    ]


def test_the_time_of_loading_is_known_once_models_are_loaded(several, tmp_path):
    state = SharedState(1)
    assert exported(several, tmp_path, "model_loaded", state=state) == []
    before = time.time()
    state.set_loaded()
    found = dict(line.rsplit(" ", 1) for line in exported(several, tmp_path, "model_loaded", state=state))
    names = ('model="first-one",version="1.0.0"', 'model="second",version="3"')
    assert list(found) == [f"model_loaded_timestamp_seconds{{{name}}}" for name in names]
    assert all(before <= float(value) <= time.time() for value in found.values())
