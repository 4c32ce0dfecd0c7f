"""Trains simplemodel and writes its bundles: ``python train.py [DIRECTORY]``, by default next to this file.

Two numbers come in, the probability of an event goes out. The truth is known, since the data are made here:
the log-odds of the event are ``4 x1 + 5 x2 - 6 x1 x2 - 2.461``, so that P(event | 0.2, 0.6) = 0.65.
Every random number comes from a fixed seed and one thread does the arithmetic, in float64: processors round in
different places, and over a thousand steps float32 would carry that up to the third digit of an answer. What is
delivered is float32. The bundles beside this file are of a run that was float32 throughout, and keep their bytes,
because a host refuses other content under a version that it has: a run of today answers the same to within 0.0002.
"""

import hashlib
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

sys.path.append(str(Path(__file__).resolve().parents[2] / "service"))
from model_server import reference  # noqa: E402

HERE = Path(__file__).resolve().parent
FEATURES = ["x1", "x2"]
TOLERANCE = 1e-4
EXAMPLE_ROWS = ([0.2, 0.6], [0.0, 0.0], [1.0, -1.0], [-0.8, 1.2], [1.5, 1.5])


@dataclass(frozen=True)
class Recipe:
    """How one version is trained."""

    version: str
    description: str
    hidden: int
    rows: int
    steps: int


RECIPES = (
    Recipe("1.0.0", "Probability of an event from two numbers; a small network.", hidden=4, rows=4_000, steps=1_000),
    Recipe(
        "1.1.0",
        "Probability of an event from two numbers; wider and trained longer on more data.",
        hidden=16,
        rows=40_000,
        steps=1_500,
    ),
)

MODEL_SOURCE = '''"""A small multi-layer perceptron: two numbers in, one probability out."""

import torch


class SimpleModel(torch.nn.Module):
    """Maps float32 of shape [rows, 2] to probabilities, float32 of shape [rows, 1]."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(2, hidden),
            torch.nn.Tanh(),
            torch.nn.Linear(hidden, 1),
            torch.nn.Sigmoid(),
        )

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.layers(rows)
'''


def true_probability(points: torch.Tensor) -> torch.Tensor:
    """The probability of the event at ``points`` [rows, 2]; shape [rows, 1]."""
    x1, x2 = points[:, :1], points[:, 1:]
    return torch.sigmoid(4 * x1 + 5 * x2 - 6 * x1 * x2 - 2.461)


def sample(rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points in the square from -1.5 to 1.5, and for each whether the event happened (0 or 1)."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.rand(rows, 2, generator=generator) * 3 - 1.5
    return points, torch.bernoulli(true_probability(points), generator=generator)


def new_model(hidden: int) -> torch.nn.Module:
    """The bundle's own class, from the very text that is delivered."""
    namespace: dict = {"__name__": "model"}
    exec(MODEL_SOURCE, namespace)
    return namespace["SimpleModel"](hidden=hidden)


def train(recipe: Recipe) -> torch.nn.Module:
    """A trained model in evaluation mode, of float32."""
    torch.manual_seed(7)
    points, events = (drawn.double() for drawn in sample(recipe.rows, seed=1))
    model = new_model(recipe.hidden).double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for _ in range(recipe.steps):
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy(model(points), events).backward()
        optimizer.step()
    return model.float().eval()


@torch.inference_mode()
def accuracy(model: torch.nn.Module) -> float:
    """The share of events guessed right on 200,000 points that no model was trained on."""
    points, events = sample(200_000, seed=2)
    return ((model(points) > 0.5) == (events > 0.5)).double().mean().item()


@torch.inference_mode()
def examples(model: torch.nn.Module) -> list[dict]:
    """Requests with the answers that the model gives: each row alone, then all of them together."""
    requests = [{"data": row} for row in EXAMPLE_ROWS] + [{"data": list(EXAMPLE_ROWS)}]
    found = []
    for request in requests:
        single = not isinstance(request["data"][0], list)
        outputs = model(torch.tensor([request["data"]] if single else request["data"])).flatten().tolist()
        response = {"output": outputs[0] if single else outputs}
        found.append({"request": request, "response": response, "tolerance": TOLERANCE})
    return found


def write_bundle(directory: Path, recipe: Recipe) -> None:
    """Train ``recipe`` and replace the bundle in ``directory``."""
    model = train(recipe)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    manifest = {
        "name": "simplemodel",
        "version": recipe.version,
        "description": recipe.description,
        "entry": {"file": "model.py", "class": "SimpleModel", "arguments": {"hidden": recipe.hidden}},
        "weights": "weights.pth",
        "input": {"shape": [2], "dtype": "float32", "features": FEATURES},
        "output": {"shape": [1], "dtype": "float32"},
        "batching": {"max_rows": 64},
        "metrics": {"accuracy": round(accuracy(model), 4)},
        "reference": reference.FILE,
    }
    (directory / "manifest.yaml").write_text(yaml.safe_dump(manifest, sort_keys=False, default_flow_style=None))
    points, _ = sample(recipe.rows, seed=1)
    training_rows = dict(zip(FEATURES, points.T.tolist(), strict=True))
    (directory / reference.FILE).write_text(reference.to_text(reference.measure(training_rows)))
    (directory / "model.py").write_text(MODEL_SOURCE)
    torch.save(model.state_dict(), directory / "weights.pth")
    (directory / "examples.json").write_text(json.dumps({"examples": examples(model)}, indent=1) + "\n")
    sums = [f"{hashlib.sha256(file.read_bytes()).hexdigest()}  {file.name}" for file in sorted(directory.iterdir())]
    (directory / "SHA256SUMS").write_text("\n".join(sums) + "\n")
    print(f"{directory}: accuracy {manifest['metrics']['accuracy']}")


def main() -> None:
    """Train every version."""
    torch.set_num_threads(1)
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
    for recipe in RECIPES:
        write_bundle(target / recipe.version, recipe)


if __name__ == "__main__":
    main()
