"""The digits bundle: what its script makes, and a service that answers with it."""

import base64
import importlib.util
import io
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from bundle_making import ROOT
from model_server import bundle, loading
from model_server.payload import same
from PIL import Image, ImageDraw, ImageFont
from test_service import Service, running

DIGITS = ROOT / "bundles" / "digits"
SHIPPED = DIGITS / "1.0.0"
EXAMPLES = json.loads((SHIPPED / "examples.json").read_text())["examples"]


def drawn(text: str) -> bytes:
    """A PNG file with ``text`` in Pillow's own font."""
    image = Image.new("L", (160, 200), 255)
    ImageDraw.Draw(image).text((80, 100), text, font=ImageFont.load_default(200), fill=0, anchor="mm")
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def check_answer(value: dict) -> None:
    assert value.keys() == {"class", "probability", "top"}
    assert value["top"][0] == {"class": value["class"], "probability": value["probability"]}
    probabilities = [one["probability"] for one in value["top"]]
    assert len(probabilities) == 3 and probabilities == sorted(probabilities, reverse=True)
    assert value["probability"] >= 0.1 and sum(probabilities) <= 1.0001
    assert len({one["class"] for one in value["top"]} & set("0123456789")) == 3


def test_shipped_bundle_loads_and_reproduces_its_examples():
    found = bundle.read(SHIPPED)
    assert found.metrics["accuracy"] >= 0.97
    assert [example.response["output"]["class"] for example in found.examples[:10]] == list("0123456789")
    # Loading answers the examples and compares.
    model = loading.load(found).default
    [outputs] = model.predict([model.prepare([drawn(digit) for digit in "0123456789"])])
    for value in outputs:
        check_answer(value)
    # Printed digits of one font are not what it is trained on, yet it tells most of them.
    assert sum(value["class"] == digit for value, digit in zip(outputs, "0123456789", strict=True)) >= 6


def test_shipped_code_is_the_scripts():
    spec = importlib.util.spec_from_file_location("train_digits", DIGITS / "train.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert (SHIPPED / "model.py").read_text() == script.MODEL_SOURCE


def test_training_reproduces_the_shipped_bundle(tmp_path):
    pytest.importorskip("sklearn", reason="trains for a minute; needs the digits: pip install scikit-learn")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, DIGITS / "train.py", tmp_path], check=True, capture_output=True, env=environment)
    made = json.loads((tmp_path / "1.0.0" / "examples.json").read_text())["examples"]
    assert bundle.read(tmp_path / "1.0.0").metrics == bundle.read(SHIPPED).metrics
    for left, right in zip(made, EXAMPLES, strict=True):
        assert left["request"] == right["request"]
        assert same(right["response"], left["response"], right["tolerance"])


@pytest.fixture(scope="module")
def service() -> Iterator[Service]:
    with (
        tempfile.TemporaryDirectory(prefix="ms-", dir="/tmp") as name,
        running(Path(name), SHIPPED, MODEL_WORKERS=1) as started,
    ):
        started.wait_ready()
        yield started


def post(service: Service, body: bytes, content_type: str) -> tuple[int, dict]:
    status, _, answer = service.ask("worker-0", "POST", "/predict", body, Content_Type=content_type)
    return status, json.loads(answer)


def form(*files: bytes) -> tuple[bytes, str]:
    parts = [
        b'--line\r\nContent-Disposition: form-data; name="image"; filename="x"\r\nContent-Type: image/png\r\n\r\n%s\r\n'
        % file
        for file in files
    ]
    return b"".join(parts) + b"--line--\r\n", "multipart/form-data; boundary=line"


def test_every_way_to_send_an_image_gets_the_same_answer(service):
    images = [drawn(digit) for digit in "70"]
    texts = [base64.b64encode(image).decode() for image in images]
    status, expected = post(service, images[0], "image/png")
    assert status == 200
    check_answer(expected["output"])
    assert post(service, *form(images[0])) == (200, expected)
    for data in (texts[0], f"data:image/png;base64,{texts[0]}"):
        assert post(service, json.dumps({"data": data}).encode(), "application/json") == (200, expected)
    status, both = post(service, json.dumps({"data": texts}).encode(), "application/json")
    assert status == 200 and same(both["output"][0], expected["output"], 1e-5)
    status, answer = post(service, *form(*images))
    assert status == 200 and same(answer, both, 1e-5)


def test_metrics_tell_the_classes(service):
    before = service.metrics()
    assert service.predict([example["request"]["data"] for example in EXAMPLES[:4]])[0] == 200
    after = service.metrics()
    for digit in range(5):
        name = f'model_predicted_class_total{{class="{digit}",model="digits"}}'
        assert after[name] - before.get(name, 0) == (digit < 4)
    name = 'model_prediction_confidence_count{model="digits"}'
    assert after[name] - before.get(name, 0) == 4
    assert after["acc_digits"] >= 0.97


def test_a_bad_image_fails_none_of_its_neighbours(service):
    bad = drawn("5")[:300]

    def ask(number: int) -> None:
        if number % 4 == 3:
            assert post(service, bad, "image/png") == (400, {"error": "the image is damaged or incomplete"})
            return
        example = EXAMPLES[number % 10]
        status, _, body = service.predict(example["request"]["data"])
        assert status == 200 and same(example["response"], json.loads(body), example["tolerance"])

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(ask, range(200)))
    mixed = [EXAMPLES[0]["request"]["data"], base64.b64encode(bad).decode()]
    status, _, body = service.predict(mixed)
    assert (status, json.loads(body)) == (400, {"error": "image 2 of 2 is damaged or incomplete"})
    assert not [line for line in service.logs() if line["event"] in ("prediction_failed", "internal_error")]
