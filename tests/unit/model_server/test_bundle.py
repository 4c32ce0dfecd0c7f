"""What a bundle may get wrong, and that the message says what it was."""

import errno
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bundle_making import SHIPPED, write_sums
from model_server import loading, payload
from model_server.bundle import BundleError, read


def rejected(directory: Path, *words: str, load: bool = False) -> None:
    with pytest.raises(BundleError) as caught:
        bundle = read(directory)
        if load:
            loading.load(bundle)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize("version", ["1.0.0", "1.1.0"])
def test_shipped_bundles_load_and_reproduce(version):
    bundle = read(SHIPPED / version)
    assert (bundle.name, bundle.version, bundle.max_rows) == ("simplemodel", version, 64)
    assert bundle.digest.startswith("sha256:") and len(bundle.digest) == 71
    assert loading.load(bundle).default.predict([[[0.2, 0.6]]]) == [[pytest.approx(0.65, abs=0.03)]]


def test_missing_directory(tmp_path):
    rejected(tmp_path / "none", "none", "not a directory")


def test_changed_file(bundle_dir):
    with open(bundle_dir / "weights.pth", "ab") as file:
        file.write(b"x")
    rejected(bundle_dir, "bundle simplemodel 1.0.0: weights.pth doesn't match its checksum")


@pytest.mark.parametrize("name", ["manifest.yaml", "model.py", "weights.pth", "examples.json", "SHA256SUMS"])
def test_missing_file(bundle_dir, name):
    (bundle_dir / name).unlink()
    rejected(bundle_dir, name, "missing")


def failing(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize(
    ("place", "name"), [(Path, "read_bytes"), (hashlib, "file_digest"), (os, "scandir")], ids=["read", "hash", "list"]
)
@pytest.mark.parametrize("number", [errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EACCES, errno.ELOOP])
def test_what_the_machine_is_short_of_is_no_fault_of_the_bundle(monkeypatch, place, name, number):
    monkeypatch.setattr(place, name, failing(OSError(number, os.strerror(number), "a-file")))
    at_fault = number in (errno.EACCES, errno.ELOOP)
    with pytest.raises(BundleError if at_fault else OSError, match=os.strerror(number)):
        read(SHIPPED / "1.0.0")


@pytest.mark.parametrize("place", ["yaml.load", "json.loads", "hashlib.file_digest"])
def test_a_lack_of_memory_is_no_fault_of_the_bundle(monkeypatch, place):
    monkeypatch.setattr(f"model_server.bundle.{place}", failing(MemoryError()))
    with pytest.raises(MemoryError):
        read(SHIPPED / "1.0.0")


@pytest.mark.parametrize("error", ["OSError(5, 'Input/output error', 'weights.pth')", "MemoryError()"])
def test_what_may_pass_is_tried_again(short_dir, error):
    # 78 would tell systemd that another start is useless.
    program = f"""
import model_server.__main__ as service
def read(directory):
    raise {error}
service.read = read
service.os._exit(service.main())
"""
    service = Path(__file__).resolve().parents[3] / "service"
    environment = os.environ | {"MODEL_SOCKET_DIR": str(short_dir), "PYTHONPATH": str(service)}
    command = [sys.executable, "-c", program]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 1, answer.stderr
    line = json.loads((answer.stdout + answer.stderr).splitlines()[-1])
    assert line["event"] == "failed"
    if "OSError" in error:
        assert "Input/output error: 'weights.pth'" in line["message"]


def test_unlisted_file(bundle_dir):
    (bundle_dir / "extra").mkdir()
    (bundle_dir / "extra" / "helper.py").write_text("")
    rejected(bundle_dir, "extra/helper.py is not listed")


@pytest.mark.parametrize("target", ["model.py", "/etc/passwd", "."])
def test_links(bundle_dir, target):
    (bundle_dir / "link").symlink_to(target)
    rejected(bundle_dir, "link is a link")


def test_linked_manifest(bundle_dir):
    (bundle_dir / "manifest.yaml").rename(bundle_dir / "other.yaml")
    (bundle_dir / "manifest.yaml").symlink_to("other.yaml")
    rejected(bundle_dir, "manifest.yaml is not an ordinary file")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "a\\b"])
def test_escape_in_checksums(bundle_dir, name):
    with open(bundle_dir / "SHA256SUMS", "a") as file:
        file.write(f"{'0' * 64}  {name}\n")
    rejected(bundle_dir, "SHA256SUMS line 6", "not a path inside the bundle")


@pytest.mark.parametrize("line", ["nonsense", "", f"{'G' * 64}  x", f"{'0' * 64}x"])
def test_malformed_checksums(bundle_dir, line):
    with open(bundle_dir / "SHA256SUMS", "a") as file:
        file.write(line + "\n")
    rejected(bundle_dir, "SHA256SUMS line 6")


def test_file_listed_twice(bundle_dir):
    text = (bundle_dir / "SHA256SUMS").read_text()
    (bundle_dir / "SHA256SUMS").write_text(text + text.splitlines()[0] + "\n")
    rejected(bundle_dir, "twice")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("name: simplemodel", "name: Simple.Model", ["name is 'Simple.Model'"]),
        ("name: simplemodel", "title: x", ["name is missing"]),
        ("version: 1.0.0", "version: 1.0", ["version is 1.0", "quotes"]),
        ("version: 1.0.0", "version: ../1", ["version is '../1'"]),
        ("description:", "author: x\ndescription:", ["author is not a known field"]),
        ("file: model.py", "file: ../model.py", ["entry.file", "not a path inside"]),
        ("file: model.py", "file: /model.py", ["entry.file", "not a path inside"]),
        ("file: model.py", "file: other.py", ["entry.file is 'other.py'"]),
        ("class: SimpleModel", "class: Simple Model", ["entry.class"]),
        ("arguments: {hidden: 4}", "arguments: 4", ["entry.arguments"]),
        ("weights: weights.pth", "weights: ../weights.pth", ["weights", "not a path inside"]),
        ("shape: [2]", "shape: [0]", ["input.shape is [0]"]),
        ("shape: [2]", "shape: [3]", ["input.features"]),
        ("dtype: float32", "dtype: float16", ["input.dtype is 'float16'"]),
        ("max_rows: 64", "max_rows: 0", ["batching.max_rows is 0"]),
        ("max_rows: 64", "max_rows: true", ["batching.max_rows is True"]),
        ("max_rows: 64", "maximum: 64", ["batching.max_rows is missing"]),
        ("accuracy: 0.", "accuracy: x0.", ["metrics.accuracy"]),
        ("accuracy: 0.", "accuracy: " + "9" * 400 + ".", ["metrics.accuracy", "finite"]),
        ("accuracy: 0.", "big: " + "9" * 400 + ", accuracy: 0.", ["metrics.big", "finite"]),
        ("shape: [2]", "shape: []", ["input.features", "0 names"]),
        ("version: 1.0.0", "version: 2026-13-45", ["not YAML", "month"]),
        ("arguments: {hidden: 4}", "arguments: " + "[" * 5000, ["not YAML"]),
        ("name: simplemodel", "name: [", ["not YAML"]),
        ("version: 1.0.0", "version:", ["version is missing"]),
        ("description:", "colour:\ndescription:", ["colour is not a known field"]),
        ("accuracy: 0.", "recall:, accuracy: 0.", ["metrics.recall is missing"]),
        ("version: 1.0.0", "version: 1.0.0\nversion: 1.0.1", ["version is there a second time, in line 3"]),
        ("arguments: {hidden: 4}", "arguments: {hidden: 4, hidden: 5}", ["hidden is there a second time"]),
    ],
)
def test_manifest_fields(edit, old, new, words):
    rejected(edit("manifest.yaml", old, new), "manifest.yaml", *words)


def test_optional_fields_without_a_value_are_as_good_as_absent(edit, bundle_dir):
    lines = (bundle_dir / "manifest.yaml").read_text().splitlines()
    [metrics] = [line for line in lines if line.startswith("metrics:")]
    empty = "metrics:\nspeed:\ndevice:\nhandler:\nmodels:\nweights_format:"
    bundle = read(edit("manifest.yaml", metrics, empty))
    assert (bundle.metrics, bundle.speed.options, bundle.device, bundle.weights_format) == ({}, (), "cpu", "state_dict")


@pytest.mark.parametrize("text", ["[]", "{}", '{"examples": []}', '{"examples": [{"request": 1}]}', "x", "[" * 100_000])
def test_malformed_examples(bundle_dir, text):
    (bundle_dir / "examples.json").write_text(text)
    write_sums(bundle_dir)
    rejected(bundle_dir, "examples.json")


@pytest.mark.parametrize(("key", "words"), [("tolerance", "tolerance"), ("response", "doesn't reproduce")])
def test_huge_numbers_in_examples(bundle_dir, key, words):
    example = {"request": {"data": [0.2, 0.6]}, "response": {"output": 0.65}, "tolerance": 1}
    example |= {"tolerance": 10**400} if key == "tolerance" else {"response": {"output": 10**400}}
    (bundle_dir / "examples.json").write_text(json.dumps({"examples": [example]}))
    write_sums(bundle_dir)
    rejected(bundle_dir, words, load=True)


@pytest.mark.parametrize("place", ["import torch\n", "super().__init__()\n", "return self.layers(rows)\n"])
def test_model_that_exits(edit, place):
    indent = "" if place.startswith("import") else "        "
    rejected(edit("model.py", place, f"import sys; sys.exit(0)\n{indent}{place}"), "SystemExit", load=True)


def test_missing_class(edit):
    rejected(edit("manifest.yaml", "class: SimpleModel", "class: Other"), "no class Other", load=True)


def test_class_that_is_no_module(edit):
    rejected(edit("model.py", "class SimpleModel(torch.nn.Module)", "class SimpleModel"), "torch.nn.Module", load=True)


def test_model_that_fails_to_import(edit):
    rejected(edit("model.py", "import torch", "import torch, missing_package"), "missing_package", load=True)


def test_unknown_argument(edit):
    rejected(edit("manifest.yaml", "hidden: 4", "hiden: 4"), "entry.arguments", "hiden", load=True)


def test_weights_that_do_not_fit(edit):
    rejected(edit("manifest.yaml", "hidden: 4", "hidden: 5"), "weights.pth doesn't fit SimpleModel", load=True)


def test_weights_that_hold_code(bundle_dir):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (bundle_dir.parent / "touched",))

    torch.save({"layers.0.weight": Evil()}, bundle_dir / "weights.pth")
    write_sums(bundle_dir)
    rejected(bundle_dir, "weights.pth can't be loaded", load=True)
    assert not (bundle_dir.parent / "touched").exists()


def test_examples_that_do_not_reproduce(bundle_dir):
    path = bundle_dir / "examples.json"
    document = json.loads(path.read_text())
    document["examples"][1]["response"]["output"] += 0.001
    path.write_text(json.dumps(document))
    write_sums(bundle_dir)
    rejected(bundle_dir, "example 1 doesn't reproduce", load=True)


def test_a_long_answer_in_a_message_says_how_long_it_is():
    assert payload.shortened("x" * 200) == "x" * 200
    assert payload.shortened("x" * 241) == "x" * 200 + "… (241 characters)"


def test_example_with_a_wrong_request(bundle_dir):
    path = bundle_dir / "examples.json"
    document = json.loads(path.read_text())
    document["examples"][2]["request"]["data"] = [1]
    path.write_text(json.dumps(document))
    write_sums(bundle_dir)
    rejected(bundle_dir, "example 2", "2 elements", load=True)


def test_output_that_breaks_the_promise(edit):
    rejected(edit("model.py", "return self.layers(rows)", "return self.layers(rows)[:, :0]"), "promises", load=True)


def test_output_that_is_not_finite(edit):
    rejected(edit("model.py", "return self.layers(rows)", "return self.layers(rows) / 0"), "finite", load=True)


def test_model_that_starts_threads(edit):
    code = "import threading, time\nthreading.Thread(target=time.sleep, args=(2,), daemon=True).start()\nimport torch"
    rejected(edit("model.py", "import torch", code), "starts threads", load=True)


def test_model_that_sets_the_number_of_threads(edit):
    directory = edit("model.py", "import torch\n", "import torch\n\ntorch.set_num_threads(2)\n")
    try:
        rejected(directory, "sets PyTorch's threads to 2", load=True)
    finally:
        torch.set_num_threads(1)


def test_pre_and_postprocessing(edit, bundle_dir):
    methods = (
        "def preprocess(self, data):\n        return torch.tensor([[0.0, 0.0] for _ in data])\n\n"
        "    def postprocess(self, output):\n        return [{'p': p} for p in output.flatten().tolist()]\n\n"
        "    def forward("
    )
    edit("model.py", "def forward(", methods)
    answer = {"output": {"p": 0.0}}
    example = {"request": {"data": [0.2, 0.6]}, "response": answer, "tolerance": 1}
    (bundle_dir / "examples.json").write_text(json.dumps({"examples": [example]}))
    write_sums(bundle_dir)
    [values] = loading.load(read(bundle_dir)).default.predict([[[1, 2], [3, 4]]])
    assert values[0].keys() == {"p"} and values[0] == values[1]


def test_loading_leaves_no_bytecode_behind(bundle_dir):
    before = sorted(bundle_dir.iterdir())
    loading.load(read(bundle_dir))
    assert sorted(bundle_dir.iterdir()) == before
