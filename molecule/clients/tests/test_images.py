"""A model of images on the idle colour, delivered as any other, while production goes on with its own."""

import base64
import json
import uuid
from pathlib import Path

import pytest

PROJECT = Path(__file__).resolve().parents[3]
BUNDLE = PROJECT / "bundles/digits/1.0.0"
EXAMPLES = json.loads((BUNDLE / "examples.json").read_text())["examples"]
IMAGES = [(base64.b64decode(each["request"]["data"]), each["response"]["output"]["class"]) for each in EXAMPLES[:5]]


@pytest.fixture(scope="module", autouse=True)
def digits(playbook):
    """Digits on the idle colour, and afterwards what the inventory says."""
    placed = playbook("deploy", "-e", f"bundle={BUNDLE}")
    assert placed.returncode == 0, placed.stdout[-3000:]
    yield
    assert playbook("site", "--tags", "releases").returncode == 0


def form(image):
    """A form with one file, as curl -F makes it."""
    boundary = uuid.uuid4().hex
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="image"; filename="digit.png"\r\n\r\n'
    body = head.encode() + image + f"\r\n--{boundary}--\r\n".encode()
    return body, {"Content-Type": f"multipart/form-data; boundary={boundary}"}


def as_json(image):
    return json.dumps({"data": base64.b64encode(image).decode()}).encode(), {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    "encode", [form, as_json, lambda image: (image, {"Content-Type": "image/png"})], ids=["form", "base64", "raw"]
)
def test_images_in_every_form(edge, encode):
    for image, digit in IMAGES:
        answer = edge.request("POST", "/test/predict", *encode(image))
        assert answer.status == 200, answer.text
        assert answer.json["output"]["class"] == digit
        assert len(answer.json["output"]["top"]) == 3


def test_torchserve_clients_get_labels_with_probabilities(edge):
    for image, digit in IMAGES:
        answer = edge.request("PUT", "/test/predictions/digits", image)
        assert answer.status == 200, answer.text
        chances = list(answer.json.values())
        assert next(iter(answer.json)) == digit and len(chances) == 3
        assert chances == sorted(chances, reverse=True)


def test_what_is_no_image_is_refused(edge):
    image = IMAGES[0][0]
    for body in (image[:40], b"GIF89a" + image, b"\x89PNG\r\n\x1a\n"):
        answer = edge.request("POST", "/test/predict", body, {"Content-Type": "image/png"})
        assert answer.status == 400 and answer.json["error"]


def test_its_accuracy_is_a_metric_of_its_colour(host):
    idle = json.loads(host.check_output("appliance status --json").splitlines()[-1])["idle"]
    assert "acc_digits 0.9944" in host.check_output(f"curl -fsS http://127.0.0.1:9145/{idle}/metrics")


def test_production_has_its_own_model(edge):
    assert edge.request("GET", "/health").json["model"] == "simplemodel"
    assert edge.predict().status == 200
