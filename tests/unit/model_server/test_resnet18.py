"""The script that writes bundles of ResNet-18."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bundle_making import ROOT
from model_server import bundle, loading

MAKE = ROOT / "bundles" / "resnet18" / "make.py"


def make(*arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, MAKE, *map(str, arguments)], capture_output=True, text=True)


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("resnet18") / "1.0.0"
    done = make(directory)
    assert done.returncode == 0 and "predicts nothing useful" in done.stdout, done.stderr
    return directory


def test_untrained_bundle_is_served(untrained):
    found = bundle.read(untrained)
    assert "predicts nothing useful" in found.description
    assert found.input.shape == (3, 224, 224) and found.output.shape == (1000,)
    # Loading answers the examples and compares.
    model = loading.load(found).default
    [[value]] = model.predict([torch.zeros(1, 3, 224, 224)])
    # Random, but neither all alike nor all on one class.
    assert 0.002 < value["probability"] < 0.9 and len(value["top"]) == 5


def test_parameters_have_the_usual_names_and_shapes(untrained):
    state = torch.load(untrained / "weights.pth", weights_only=True)
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    assert len(shapes) == 122
    assert sum(state[name].numel() for name in shapes if name.endswith((".weight", ".bias"))) == 11_689_512
    expected = {
        "conv1.weight": (64, 3, 7, 7),
        "bn1.running_mean": (64,),
        "layer1.0.conv1.weight": (64, 64, 3, 3),
        "layer1.1.bn2.num_batches_tracked": (),
        "layer2.0.downsample.0.weight": (128, 64, 1, 1),
        "layer3.0.downsample.1.running_var": (256,),
        "layer4.1.conv2.weight": (512, 512, 3, 3),
        "fc.weight": (1000, 512),
        "fc.bias": (1000,),
    }
    assert expected.items() <= shapes.items()


def test_own_weights_and_labels(untrained, tmp_path):
    state = torch.load(untrained / "weights.pth", weights_only=True)
    # The published file is older than these counters.
    state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    torch.save(state, tmp_path / "own.pth")
    names = [f"thing {number}" for number in range(998)] + ["crane", "crane"]
    (tmp_path / "labels.txt").write_text("\n".join(names) + "\n")
    done = make(tmp_path / "made", "--weights", tmp_path / "own.pth", "--labels", tmp_path / "labels.txt")
    assert done.returncode == 0, done.stderr
    found = bundle.read(tmp_path / "made")
    assert "nothing useful" not in found.description
    assert found.output.labels[-2:] == ("crane (998)", "crane (999)")
    theirs, ours = (
        [example["response"]["output"] for example in json.loads((folder / "examples.json").read_text())["examples"]]
        for folder in (untrained, tmp_path / "made")
    )
    assert [value["probability"] for value in ours] == pytest.approx([value["probability"] for value in theirs])


def test_labels_must_be_as_many_as_the_classes(tmp_path):
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    done = make(tmp_path / "made", "--labels", tmp_path / "labels.txt")
    assert done.returncode == 2 and "has 2 lines; it must have 1000" in done.stderr
    assert not (tmp_path / "made").exists()
