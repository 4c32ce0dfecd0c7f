"""Trains digits and writes its bundle: ``python train.py [DIRECTORY]``, by default next to this file.

Needs scikit-learn, which nothing else here does, for the 1,797 handwritten digits of 8 x 8 pixels that it brings:
``pip install --target /tmp/sklearn scikit-learn && PYTHONPATH=/tmp/sklearn python train.py``.

A fifth of the digits is held out, and the manifest's accuracy is measured on it. The others are moved, turned and
scaled a little at every step, so that digits which fill their image less well are recognised too. Every random number
comes from a fixed seed and one thread does the arithmetic: a second run on the same kind of machine gives the same
bytes, and one elsewhere the same examples within their tolerance.
"""

import argparse
import base64
import hashlib
import io
import json
import math
import shutil
from pathlib import Path

import torch
import yaml
from PIL import Image

HERE = Path(__file__).resolve().parent
VERSION = "1.0.0"
TOLERANCE = 1e-3
TOP = 3
MEAN, STD = 0.75, 0.35
EPOCHS = 120
BATCH_ROWS = 64
HELD_OUT = 360
# Examples whose classes are nearer to each other could change their order on another machine.
LEAST_RATIO = 1.2

MODEL_SOURCE = '''"""A small convolutional network for images of handwritten digits."""

import torch


class Digits(torch.nn.Module):
    """Maps float32 of shape [rows, 1, 8, 8] to a score for each digit, float32 of shape [rows, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(1, 16, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.Conv2d(16, 32, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.MaxPool2d(2),
            torch.nn.Conv2d(32, 32, 3, padding=1),
            torch.nn.ReLU(),
            torch.nn.Flatten(),
            torch.nn.Linear(32 * 4 * 4, 10),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.layers(images)
'''


def new_model() -> torch.nn.Module:
    """The bundle's own class, from the very text that is delivered."""
    namespace: dict = {"__name__": "model"}
    exec(MODEL_SOURCE, namespace)
    return namespace["Digits"]()


def load() -> tuple[torch.Tensor, torch.Tensor]:
    """All digits, shuffled: uint8 of shape [rows, 8, 8] in dark ink on white, and which digits they are."""
    from sklearn.datasets import load_digits

    found = load_digits()
    # They come as ink from 0 to 16.
    images = torch.tensor((1 - found.images / 16) * 255).round().to(torch.uint8)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(1))
    return images[order], torch.tensor(found.target)[order]


def normalised(images: torch.Tensor) -> torch.Tensor:
    """What the service makes of such images: float32 of shape [rows, 1, 8, 8]."""
    return (images.unsqueeze(1) / 255 - MEAN) / STD


def varied(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Normalised ``images``, each moved, turned, scaled and made paler or darker by chance."""
    rows = len(images)

    def chance(low: float, high: float) -> torch.Tensor:
        return torch.rand(rows, generator=generator) * (high - low) + low

    angle, across, down = chance(-0.2, 0.2), chance(0.9, 2.0), chance(0.9, 1.7)
    matrix = torch.stack(
        [
            torch.stack([across * angle.cos(), -across * angle.sin(), chance(-0.3, 0.3)], 1),
            torch.stack([down * angle.sin(), down * angle.cos(), chance(-0.3, 0.3)], 1),
        ],
        1,
    )
    # Ink is 1 here, so that what comes in from outside is paper. Larger in between, since 8 pixels blur at once.
    ink = torch.nn.functional.interpolate(1 - images.unsqueeze(1) / 255, size=(32, 32), mode="bilinear")
    grid = torch.nn.functional.affine_grid(matrix, [rows, 1, 32, 32], align_corners=False)
    moved = torch.nn.functional.grid_sample(ink, grid, align_corners=False)
    ink = torch.nn.functional.interpolate(moved, size=(8, 8), mode="area")
    ink = (ink * chance(0.7, 1.3).view(-1, 1, 1, 1)).clamp(0, 1)
    return (1 - ink - MEAN) / STD


def train(images: torch.Tensor, digits: torch.Tensor) -> torch.nn.Module:
    """A trained model in evaluation mode."""
    torch.manual_seed(7)
    generator = torch.Generator().manual_seed(2)
    model = new_model()
    optimizer = torch.optim.Adam(model.parameters())
    batches = math.ceil(len(images) / BATCH_ROWS)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.004, total_steps=EPOCHS * batches)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(images), generator=generator).split(BATCH_ROWS):
            # A third of them as they are.
            kept, changed = rows[: len(rows) // 3], rows[len(rows) // 3 :]
            batch = torch.cat([normalised(images[kept]), varied(images[changed], generator)])
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(batch), torch.cat([digits[kept], digits[changed]])).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.inference_mode()
def accuracy(model: torch.nn.Module, images: torch.Tensor, digits: torch.Tensor) -> float:
    """The share of ``images`` that are recognised."""
    return (model(normalised(images)).argmax(1) == digits).double().mean().item()


@torch.inference_mode()
def examples(model: torch.nn.Module, images: torch.Tensor, digits: torch.Tensor) -> list[dict]:
    """Requests with the answers that the model gives: an image of each digit alone, then three together."""
    requests, values = [], []
    for digit in range(10):
        for image in images[digits == digit]:
            best = model(normalised(image[None])).softmax(1)[0].topk(TOP + 1)
            probabilities, classes = best.values.tolist(), best.indices.tolist()
            clear = all(probabilities[i] > LEAST_RATIO * probabilities[i + 1] for i in range(TOP))
            if classes[0] == digit and clear:
                break
        else:
            raise SystemExit(f"no held-out image of a {digit} is recognised with a clear order of the classes")
        top = [{"class": str(classes[i]), "probability": probabilities[i]} for i in range(TOP)]
        requests.append(png(image))
        values.append({**top[0], "top": top})
    requests.append(requests[:3])
    values.append(values[:3])
    return [
        {"request": {"data": request}, "response": {"output": value}, "tolerance": TOLERANCE}
        for request, value in zip(requests, values, strict=True)
    ]


def png(image: torch.Tensor) -> str:
    """An image of shape [8, 8] as a PNG file in base64."""
    file = io.BytesIO()
    Image.frombytes("L", (8, 8), bytes(image.flatten().tolist())).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def write_bundle(directory: Path) -> None:
    """Train and replace the bundle in ``directory``."""
    images, digits = load()
    model = train(images[HELD_OUT:], digits[HELD_OUT:])
    images, digits = images[:HELD_OUT], digits[:HELD_OUT]
    measured = round(accuracy(model, images, digits), 4)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    manifest = {
        "name": "digits",
        "version": VERSION,
        "description": (
            "Which digit an image shows; a small convolutional network. Expects one handwritten digit in dark ink on "
            "a white background that fills most of the image."
        ),
        "entry": {"file": "model.py", "class": "Digits"},
        "weights": "weights.pth",
        "input": {
            "kind": "image",
            "width": 8,
            "height": 8,
            "channels": 1,
            "mean": [MEAN],
            "std": [STD],
            "max_pixels": 20_000_000,
        },
        "output": {"kind": "classes", "labels": [str(digit) for digit in range(10)], "top": TOP},
        "batching": {"max_rows": 64},
        "metrics": {"accuracy": measured},
    }
    (directory / "manifest.yaml").write_text(
        yaml.safe_dump(manifest, sort_keys=False, default_flow_style=None, width=120)
    )
    (directory / "model.py").write_text(MODEL_SOURCE)
    torch.save(model.state_dict(), directory / "weights.pth")
    found = {"examples": examples(model, images, digits)}
    (directory / "examples.json").write_text(json.dumps(found, indent=1) + "\n")
    sums = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}" for file in sorted(directory.iterdir())]
    (directory / "SHA256SUMS").write_text("\n".join(sums) + "\n")
    print(f"{directory}: accuracy {measured} on {len(images)} images that were held out")


def main() -> None:
    """Train the one version there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", type=Path, default=HERE, help="where the bundle's directory is written")
    torch.set_num_threads(1)
    write_bundle(parser.parse_args().directory / VERSION)


if __name__ == "__main__":
    main()
