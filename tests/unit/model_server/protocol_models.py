"""A bundle of several small models, one for each kind of input and output that a protocol has to carry."""

import base64
import io
import json
import socket
from pathlib import Path

import yaml
from bundle_making import SHIPPED, write_sums
from PIL import Image

HEAD = "import torch\n\n\nclass Small(torch.nn.Module):\n"


def picture(value: int) -> bytes:
    """A PNG of 4 x 4 grey pixels."""
    data = io.BytesIO()
    Image.new("L", (4, 4), value).save(data, "PNG")
    return data.getvalue()


def in_base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


MODELS = {
    # A score for each shade from the mean of the pixels, which are from -1 to 1.
    "shades": (
        {"kind": "image", "width": 4, "height": 4, "channels": 1, "mean": [0.5], "std": [0.5]},
        {"kind": "classes", "labels": ["dark", "light"], "top": 1},
        "    def forward(self, images):\n"
        "        mean = images.flatten(1).mean(1)\n"
        "        return torch.stack([-mean, mean], 1)\n",
        in_base64(picture(255)),
        {"class": "light", "probability": 0.8808, "top": [{"class": "light", "probability": 0.8808}]},
    ),
    "roots": (
        {"shape": [2, 2], "dtype": "float64"},
        {"shape": [2, 2], "dtype": "float64"},
        "    def forward(self, rows):\n        return rows.sqrt()\n",
        [[1.0, 4.0], [9.0, 16.0]],
        [[1.0, 2.0], [3.0, 4.0]],
    ),
    "parity": (
        {"shape": [], "dtype": "int64"},
        {"kind": "json"},
        "    def forward(self, rows):\n        return rows % 2\n\n"
        "    def postprocess(self, output):\n        return [{'odd': bool(value)} for value in output]\n",
        3,
        {"odd": True},
    ),
    "inverse": (
        {"shape": [2], "dtype": "bool"},
        {"shape": [2], "dtype": "bool"},
        "    def forward(self, rows):\n        return ~rows\n",
        [True, False],
        [False, True],
    ),
    # A classifier whose own code says something else of a row than the class and its probability.
    "signs": (
        {"shape": [], "dtype": "float32"},
        {"kind": "classes", "labels": ["minus", "plus"]},
        "    def forward(self, rows):\n        return torch.stack([-rows, rows], 1)\n\n"
        "    def postprocess(self, output):\n        return [['minus', 'plus'][row.argmax()] for row in output]\n",
        2.5,
        "plus",
    ),
    "lengths": (
        {"kind": "bytes"},
        {"shape": [], "dtype": "int64"},
        "    def preprocess(self, rows):\n        return torch.tensor([len(row) for row in rows])\n\n"
        "    def forward(self, rows):\n        return rows\n",
        in_base64(b"seven b"),
        7,
    ),
}


def write_family(directory: Path) -> Path:
    """Write the bundle into ``directory``; simplemodel is its default model."""
    for name, (taken, made, code, row, value) in MODELS.items():
        part = directory / name
        part.mkdir(parents=True)
        (part / "model.py").write_text(HEAD + code)
        manifest = {"description": f"The model {name}.", "entry": {"file": "model.py", "class": "Small"}}
        _finish(
            part, manifest | {"name": name, "input": taken, "output": made, "batching": {"max_rows": 8}}, row, value
        )
    simple = directory / "simplemodel"
    simple.mkdir()
    for path in (SHIPPED / "1.0.0").iterdir():
        (simple / path.name).write_bytes(path.read_bytes())
    example = json.loads((simple / "examples.json").read_text())["examples"][0]
    manifest = {"name": "family", "description": "Several models.", "models": ["simplemodel", *MODELS]}
    _finish(directory, manifest, example["request"]["data"], example["response"]["output"])
    return directory


def _finish(directory: Path, manifest: dict, row: object, value: object) -> None:
    (directory / "manifest.yaml").write_text(yaml.safe_dump({"version": "1.0.0", **manifest}))
    example = {"request": {"data": row}, "response": {"output": value}, "tolerance": 1e-3}
    (directory / "examples.json").write_text(json.dumps({"examples": [example]}))
    write_sums(directory)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]
