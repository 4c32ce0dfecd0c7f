"""Writes a bundle of ResNet-18: ``python make.py DIRECTORY [--weights FILE] [--labels FILE]``.

``--weights`` takes the usual state dict of a ResNet-18 trained on ImageNet, such as resnet18-f37072fd.pth, which you
have downloaded yourself; ``--labels`` a text file with the name of a class on each line, in the order of the
network's outputs.

Without ``--weights`` they are random, from a fixed seed: a bundle made locally, for tests and benchmarks, which costs
as much to run as a trained one and predicts nothing useful.
"""

import argparse
import base64
import hashlib
import io
import json
import sys
from pathlib import Path

import torch
import yaml
from PIL import Image

sys.path.append(str(Path(__file__).resolve().parents[2] / "service"))
from model_server.images import IMAGENET as INPUT  # noqa: E402
from model_server.payload import ClassesSpec  # noqa: E402

VERSION = "1.0.0"
TOLERANCE = 1e-3
FILES = ("examples.json", "manifest.yaml", "model.py", "weights.pth")
CLASSES, TOP = 1000, 5
EXAMPLES = 3
# Examples whose classes are nearer to each other could change their order on another machine.
LEAST_RATIO = 1.02
UNTRAINED = "Made locally, for tests and benchmarks: its weights are random, and it predicts nothing useful."

MODEL_SOURCE = '''"""ResNet-18 of "Deep Residual Learning for Image Recognition", with the usual names of parameters."""

import torch
from torch import nn


class Block(nn.Module):
    """Two convolutions and what they leave out; the first of them and the shortcut scale down by ``stride``."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or channels_in != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        shortcut = values if self.downsample is None else self.downsample(values)
        values = torch.relu(self.bn1(self.conv1(values)))
        return torch.relu(self.bn2(self.conv2(values)) + shortcut)


class ResNet18(nn.Module):
    """Maps float32 of shape [rows, 3, 224, 224] to a score for each class, float32 of shape [rows, classes]."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = nn.Sequential(Block(64, 64, 1), Block(64, 64, 1))
        self.layer2 = nn.Sequential(Block(64, 128, 2), Block(128, 128, 1))
        self.layer3 = nn.Sequential(Block(128, 256, 2), Block(256, 256, 1))
        self.layer4 = nn.Sequential(Block(256, 512, 2), Block(512, 512, 1))
        self.fc = nn.Linear(512, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        values = self.maxpool(torch.relu(self.bn1(self.conv1(images))))
        values = self.layer4(self.layer3(self.layer2(self.layer1(values))))
        return self.fc(values.mean((2, 3)))
'''


def new_model() -> torch.nn.Module:
    """The bundle's own class, from the very text that is delivered."""
    namespace: dict = {"__name__": "model"}
    exec(MODEL_SOURCE, namespace)
    return namespace["ResNet18"](CLASSES)


def picture(seed: int) -> bytes:
    """A PNG file of coloured patches of all sizes."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.zeros(1, 3, 256, 320)
    for size in (2, 4, 8, 16, 32):
        patches = torch.rand(1, 3, size, size, generator=generator) - 0.5
        values += torch.nn.functional.interpolate(patches, size=(256, 320), mode="bilinear")
    pixels = ((values[0] / 2 + 0.5).clamp(0, 1) * 255).to(torch.uint8).permute(1, 2, 0)
    file = io.BytesIO()
    Image.frombytes("RGB", (320, 256), bytes(pixels.flatten().tolist())).save(file, "PNG")
    return file.getvalue()


@torch.inference_mode()
def untrained() -> torch.nn.Module:
    """A model with random weights whose values stay in the range of a trained one's."""
    torch.manual_seed(7)
    model = new_model()
    for part in model.modules():
        if isinstance(part, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(part, torch.nn.BatchNorm2d):
            # The average of all that comes, and not mostly the default.
            part.momentum = None
    torch.nn.init.normal_(model.fc.weight, std=0.1)
    # Without statistics of what comes in, the values would grow from block to block.
    model.train()
    model(torch.stack(INPUT.prepare([picture(seed) for seed in range(1000, 1008)])))
    return model


def trained(weights: Path) -> torch.nn.Module:
    """A model with the weights of that file."""
    model = new_model()
    model.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True), strict=True)
    return model


def read_labels(file: Path) -> list[str]:
    """The lines of that file, all different: ImageNet has two kinds of crane."""
    lines = [line.strip() for line in file.read_text().splitlines()]
    return [f"{line} ({number})" if lines.count(line) > 1 else line for number, line in enumerate(lines)]


@torch.inference_mode()
def examples(model: torch.nn.Module, output: ClassesSpec) -> list[dict]:
    """Requests with the answers that the model gives, prepared and rendered by the service's own code."""
    found: list[dict] = []
    clear = ClassesSpec(output.labels, output.top + 1, output.activation)
    for seed in range(100):
        image = picture(seed)
        scores = model(torch.stack(INPUT.prepare([image])))
        top = [one["probability"] for one in clear.values(scores)[0]["top"]]
        if all(left > LEAST_RATIO * right for left, right in zip(top, top[1:], strict=False)):
            request = {"data": base64.b64encode(image).decode()}
            found.append({"request": request, "response": {"output": output.values(scores)[0]}, "tolerance": TOLERANCE})
        if len(found) == EXAMPLES:
            return found
    raise SystemExit("the model doesn't tell enough of the examples' images apart; are these the right weights?")


def write_bundle(directory: Path, model: torch.nn.Module, labels: list[str], description: str) -> None:
    """Write the bundle into ``directory``."""
    output = ClassesSpec(tuple(labels), TOP, "softmax")
    model.eval()
    directory.mkdir(parents=True, exist_ok=True)
    manifest = {
        "name": "resnet18",
        "version": VERSION,
        "description": description,
        "entry": {"file": "model.py", "class": "ResNet18", "arguments": {"classes": CLASSES}},
        "weights": "weights.pth",
        "input": {
            "kind": "image",
            "width": INPUT.width,
            "height": INPUT.height,
            "channels": INPUT.channels,
            "mean": list(INPUT.mean),
            "std": list(INPUT.std),
            "resize": INPUT.resize,
        },
        "output": {"kind": "classes", "labels": labels, "top": TOP},
        # Larger ones gain nothing. In the delay, a seventh of what one image takes, the clients that have just been
        # answered ask again, so that batches are full.
        "batching": {"max_rows": 16, "max_batch_rows": 8, "max_delay_ms": 6},
    }
    (directory / "manifest.yaml").write_text(
        yaml.safe_dump(manifest, sort_keys=False, default_flow_style=None, width=120)
    )
    (directory / "model.py").write_text(MODEL_SOURCE)
    torch.save(model.state_dict(), directory / "weights.pth")
    (directory / "examples.json").write_text(json.dumps({"examples": examples(model, output)}, indent=1) + "\n")
    sums = [f"{hashlib.sha256((directory / name).read_bytes()).hexdigest()}  {name}" for name in FILES]
    (directory / "SHA256SUMS").write_text("\n".join(sums) + "\n")


def main() -> None:
    """Write the bundle."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="becomes the bundle")
    parser.add_argument("--weights", type=Path, help="a state dict with the usual names; by default random ones")
    parser.add_argument("--labels", type=Path, help=f"{CLASSES} lines; by default class 0, class 1 …")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.labels is None:
        labels = [f"class {number}" for number in range(CLASSES)]
    else:
        labels = read_labels(arguments.labels)
    if len(labels) != CLASSES:
        parser.error(f"{arguments.labels} has {len(labels)} lines; it must have {CLASSES}")
    if arguments.weights is None:
        model, description = untrained(), f"ResNet-18. {UNTRAINED}"
    else:
        model, description = trained(arguments.weights), "ResNet-18, for photographs of 1000 kinds of things."
    write_bundle(arguments.directory, model, labels, description)
    print(f"{arguments.directory}: {description}")


if __name__ == "__main__":
    main()
