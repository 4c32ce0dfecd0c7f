"""Archives of the real torch-model-archiver become bundles; hostile ones leave nothing behind."""

import base64
import io
import json
import stat
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from bundle_making import SHIPPED
from model_server import archive, authoring, bundle_tool, handlers, loading
from model_server.bundle import BundleError, read
from model_server.errors import ModelFailed
from model_server.handlers import HandlerModule
from model_server.images import IMAGENET
from model_server.payload import BadRequest
from PIL import Image
from safetensors.torch import save_file
from service_process import running

MODEL = (SHIPPED / "1.0.0" / "model.py").read_text().replace("hidden: int)", "hidden: int = 4)")
WEIGHTS = SHIPPED / "1.0.0" / "weights.pth"
ARCHIVER = Path(sys.executable).with_name("torch-model-archiver")

IMAGES = """
import torch

class Brightness(torch.nn.Module):
    # Three scores: for red, green and blue.
    def forward(self, images):
        return images.mean((2, 3))
"""


@pytest.fixture
def archived(tmp_path):
    """Has the real archiver make an archive; files are given as name=text."""

    def make(handler: str, *options: str, files: dict[str, str] | None = None, name: str = "net") -> Path:
        for file, text in (files or {}).items():
            (tmp_path / file).write_text(text)
        command = [ARCHIVER, "--model-name", name, "--version", "1.0", "--handler", handler, *options]
        # It unpacks into a directory of the model's name in TMPDIR.
        scratch = tmp_path / "scratch"
        scratch.mkdir()
        environment = {"TMPDIR": str(scratch), "PATH": "/usr/bin:/bin"}
        subprocess.run(command, cwd=tmp_path, check=True, env=environment, capture_output=True)
        return tmp_path / f"{name}.mar"

    return make


def imported(mar: Path, *options: str) -> Path:
    target = mar.parent / "bundle"
    assert bundle_tool.main(["import", str(mar), str(target), *options]) == 0
    return target


def refused(mar: Path, capsys, *options: str) -> str:
    before = sorted(mar.parent.iterdir())
    assert bundle_tool.main(["import", str(mar), str(mar.parent / "bundle"), *options]) == 1
    assert sorted(mar.parent.iterdir()) == before
    return capsys.readouterr().err


def answer(directory: Path, row: bytes):
    """What a loaded bundle answers for one row of bytes."""
    [[value]] = loading.load(read(directory)).default.predict([[row]])
    return value


def test_eager_model(archived):
    mar = archived("base_handler", "--model-file", "net.py", "--serialized-file", str(WEIGHTS), files={"net.py": MODEL})
    directory = imported(mar, "--input-shape", "2", "--example", '{"data": [0.2, 0.6]}')
    bundle = read(directory)
    assert (bundle.name, bundle.version, bundle.entry.file) == ("net", "1.0", "net.py")
    assert bundle.output.shape == (1,)
    assert bundle.examples[0].response["output"] == pytest.approx(0.6318, abs=1e-4)
    assert sorted(path.name for path in directory.iterdir()) == [
        "SHA256SUMS", "examples.json", "manifest.yaml", "net.py", "weights.pth"
    ]  # fmt: skip


def test_input_shape_is_asked_for(archived, capsys):
    mar = archived("base_handler", "--model-file", "net.py", "--serialized-file", str(WEIGHTS), files={"net.py": MODEL})
    assert "--input-shape" in refused(mar, capsys)


def test_several_classes(archived, capsys):
    files = {"net.py": MODEL + "\n\nclass Other(SimpleModel):\n    pass\n"}
    mar = archived("base_handler", "--model-file", "net.py", "--serialized-file", str(WEIGHTS), files=files)
    assert "it has Other, SimpleModel; choose with --class" in refused(mar, capsys, "--input-shape", "2")
    directory = imported(mar, "--input-shape", "2", "--class", "Other", "--arguments", "{hidden: 4}")
    assert read(directory).entry.class_name == "Other"


def test_torchscript(archived, tmp_path):
    torch.jit.save(torch.jit.script(loading.load(read(SHIPPED / "1.0.0")).default.module), tmp_path / "net.pt")
    directory = imported(archived("base_handler", "--serialized-file", "net.pt"), "--input-shape", "2")
    bundle = read(directory)
    assert bundle.weights_format == "torchscript" and bundle.examples[0].request == {"data": [0.0, 0.0]}


def test_weights_that_hold_code(archived, tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "touched",))

    torch.save(Evil(), tmp_path / "evil.pth")
    mar = archived("base_handler", "--model-file", "net.py", "--serialized-file", "evil.pth", files={"net.py": MODEL})
    assert "could be code and isn't loaded" in refused(mar, capsys, "--input-shape", "2")
    assert not (tmp_path / "touched").exists()


def red_image() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (300, 280), (250, 20, 20)).save(stream, "PNG")
    return stream.getvalue()


def test_image_classifier(archived, tmp_path):
    (tmp_path / "red.png").write_bytes(red_image())
    files = {"net.py": IMAGES, "index_to_name.json": json.dumps({"0": ["n1", "red"], "1": "green"})}
    mar = archived("image_classifier", "--model-file", "net.py", "--extra-files", "index_to_name.json", files=files)
    bundle = read(imported(mar, "--example", str(tmp_path / "red.png")))
    assert bundle.output.labels == ("red", "green", "2")
    assert bundle.examples[0].response["output"]["class"] == "red"


def test_image_classifier_needs_an_example(archived, capsys):
    mar = archived("image_classifier", "--model-file", "net.py", files={"net.py": IMAGES})
    assert "--example FILE" in refused(mar, capsys)


HANDLER = """
from ts.context import Context
from ts.torch_handler.base_handler import BaseHandler
import torch

class Handler(BaseHandler):
    def initialize(self, context: Context):
        assert isinstance(context, Context)
        super().initialize(context)

    def preprocess(self, data):
        assert self.model_yaml_config.get("handler", {}).get("scale", 1) == 1
        return torch.tensor([row["body"]["numbers"] for row in data])

    def postprocess(self, output):
        return [{"probability": p} for p in output.flatten().tolist()]
"""
ROW = b'{"numbers": [0.2, 0.6]}'


def test_handler_that_derives_from_torchserves(archived):
    files = {"net.py": MODEL, "my_handler.py": HANDLER, "model-config.yaml": "handler: {scale: 1}\n"}
    mar = archived(
        "my_handler.py", "--model-file", "net.py", "--serialized-file", str(WEIGHTS),
        "--config-file", "model-config.yaml", files=files,
    )  # fmt: skip
    (mar.parent / "row.json").write_bytes(ROW)
    directory = imported(mar, "--example", str(mar.parent / "row.json"))
    assert yaml.safe_load((directory / "manifest.yaml").read_text())["handler"] == {
        "file": "my_handler.py", "config": "model-config.yaml"
    }  # fmt: skip
    assert read(directory).examples[0].request == {"data": base64.b64encode(ROW).decode()}
    assert answer(directory, ROW) == {"probability": pytest.approx(0.6318, abs=1e-4)}


def test_handler_that_derives_from_torchserves_with_safetensors(archived, tmp_path):
    save_file(torch.load(WEIGHTS, weights_only=True), tmp_path / "net.safetensors")
    files = {"net.py": MODEL, "my_handler.py": HANDLER}
    mar = archived("my_handler.py", "--model-file", "net.py", "--serialized-file", "net.safetensors", files=files)
    directory = imported(mar, "--example", ROW.decode())
    assert answer(directory, ROW) == {"probability": pytest.approx(0.6318, abs=1e-4)}


def test_handler_whose_weights_hold_code(archived, tmp_path, capsys):
    torch.save(torch.nn.Linear(2, 1), tmp_path / "whole.pt")
    files = {"net.py": MODEL, "my_handler.py": HANDLER}
    mar = archived("my_handler.py", "--model-file", "net.py", "--serialized-file", "whole.pt", files=files)
    message = refused(mar, capsys, "--example", ROW.decode())
    assert "could be code and isn't loaded" in message and "weights_only" not in message


def test_batch_of_a_handler_is_one_call(archived):
    # Not for the example: answers that depend on their neighbours are refused.
    code = "def handle(data, context):\n    return data and [len(data) if row['body'] else 0 for row in data]\n"
    files = {"counting.py": code}
    directory = imported(archived("counting.py", files=files), "--example", "{}")
    assert loading.load(read(directory)).default.predict([[b"a", b"b"], [b"c"]]) == [[3, 3], [3]]


def test_handler_without_a_base_class(archived):
    code = """
import os

class Lengths:
    def initialize(self, context):
        self.directory = context.system_properties.get("model_dir")
        self.factor = float(open(os.path.join(self.directory, "factor.txt")).read())
        context.metrics.add_counter("loaded", 1)

    def handle(self, data, context):
        assert context.system_properties["gpu_id"] is None and context.get_request_header(0, "x") is None
        return [len(row.get("data") or row.get("body")) * self.factor for row in data]
"""
    mar = archived("lengths.py", "--extra-files", "factor.txt", files={"lengths.py": code, "factor.txt": "2"})
    (mar.parent / "body").write_bytes(b"\x00\xff\x01")
    directory = imported(mar, "--example", str(mar.parent / "body"))
    assert answer(directory, b"\xff" * 5) == 10


def test_handler_that_refuses_a_row(archived, short_dir):
    handler = """
from ts.utils.util import PredictionException

def handle(data, context):
    if data is None:
        return None
    for row in data:
        if row["body"] == b"mine":
            raise PredictionException("no such word", 513)
        if row["body"] != b"word":
            raise PredictionException("only words are taken", 422)
    return [1 for _ in data]
"""
    mar = archived("handler.py", files={"handler.py": handler})
    mar.with_name("word").write_bytes(b"word")
    directory = imported(mar, "--example", str(mar.with_name("word")), "--input", "{kind: bytes}")
    assert answer(directory, b"word") == 1
    with pytest.raises(BadRequest, match="^only words are taken$"):
        answer(directory, b"12")
    with pytest.raises(ModelFailed):
        answer(directory, b"mine")
    with running(short_dir, directory, MODEL_WORKERS=1) as service:
        service.wait_ready()
        for body, wanted in ((b"word", (200, 1)), (b"12", (400, "only words are taken"))):
            status, _, found = service.ask("worker-0", "POST", "/predictions/net", body)
            found = json.loads(found)
            assert (status, found["message"] if status == 400 else found) == wanted


def test_handler_of_images(archived, tmp_path):
    code = """
from ts.torch_handler.image_classifier import ImageClassifier

class Top(ImageClassifier):
    topk = 2
"""
    (tmp_path / "red.png").write_bytes(red_image())
    files = {"net.py": IMAGES, "top.py": code, "index_to_name.json": json.dumps({"0": "red"})}
    mar = archived("top.py", "--model-file", "net.py", "--extra-files", "index_to_name.json", files=files)
    found = answer(imported(mar, "--example", str(tmp_path / "red.png")), red_image())
    assert list(found) == ["red", "2"] and found["red"] > 0.9


def handler_of(code: str) -> HandlerModule:
    handlers.offer_torchserve()
    from ts.torch_handler import image_classifier, vision_handler

    namespace: dict = {"torch": torch, **vars(image_classifier), **vars(vision_handler)}
    exec(code, namespace)
    handler = namespace["Handler"]()
    return HandlerModule(lambda data, _: handler.preprocess(data), SimpleNamespace(batch=lambda rows: None))


def picture(*size: int, kind: str = "PNG", drawn: bool = True) -> bytes:
    stream = io.BytesIO()
    (Image.effect_noise(size, 90).convert("RGB") if drawn else Image.new("1", size)).save(stream, kind)
    return stream.getvalue()


def test_handler_of_images_prepares_them_as_the_service_does():
    module = handler_of("class Handler(ImageClassifier):\n    pass")
    # Multiplied by 256 / 483 in floating point, a side of 483 pixels would become one of 255.
    for data in (picture(483, 700), picture(700, 483), picture(300, 300, kind="JPEG")):
        for row in (data, bytearray(data), base64.b64encode(data).decode()):
            [tensor] = module([{"data": row}])
            assert torch.equal(tensor, IMAGENET.prepare([data])[0])


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (b"no image", "isn't an image"),
        ("abcde", "a row must be an image"),
        ({"data": []}, "a row must be an image"),
        ([[1, 2], [3]], "a row must be an image"),
        (b"II*\0" + bytes(99), "isn't an image"),
        (picture(60, 40)[:-300], "damaged or incomplete"),
        (picture(1, 100_000), "too long and narrow"),
        (picture(5000, 5001, drawn=False), "more than 25000000 pixels"),
    ],
    ids=["text", "base64", "object", "numbers", "tiff", "truncated", "line", "large"],
)
def test_handler_of_images_refuses_what_the_service_does(row, words):
    module = handler_of("class Handler(ImageClassifier):\n    pass")
    with pytest.raises(BadRequest, match=words):
        module([{"body": row}])


def test_model_file_of_a_handler_is_a_module_like_any_other(archived):
    # Both together look the module up in sys.modules.
    settings = "@dataclasses.dataclass\nclass Settings:\n    hidden: int = 4\n"
    imports = f"from __future__ import annotations\nimport dataclasses\nimport torch\n\n{settings}"
    code = MODEL.replace("import torch\n", imports, 1)
    files = {"net.py": code, "my_handler.py": HANDLER}
    mar = archived("my_handler.py", "--model-file", "net.py", "--serialized-file", str(WEIGHTS), files=files)
    directory = imported(mar, "--example", ROW.decode())
    assert answer(directory, ROW) == {"probability": pytest.approx(0.6318, abs=1e-4)}


def test_handler_with_several_classes(archived, capsys):
    two = "class A:\n    def handle(self, data, context):\n        return [1] * len(data)\n"
    mar = archived("two.py", files={"two.py": two + "\n" + two.replace("A", "B").replace("[1]", "[2]")})
    message = refused(mar, capsys, "--example", "{}")
    assert "it has A, B" in message and "handler.class" in message
    assert answer(imported(mar, "--example", "{}", "--handler-class", "B"), b"x") == 2


def test_handler_that_needs_a_missing_package(archived, capsys):
    mar = archived("h.py", files={"h.py": "import package_of_nobody\n"})
    assert "h.py can't be imported: ModuleNotFoundError" in refused(mar, capsys, "--example", "{}")


@pytest.mark.parametrize("handler", ["text_classifier", "object_detector"])
def test_handlers_that_are_not_supported(archived, capsys, handler):
    mar = archived(handler, "--model-file", "net.py", files={"net.py": MODEL})
    assert f"{handler} isn't supported" in refused(mar, capsys)


def test_requirements_are_mentioned(archived, capsys):
    files = {"net.py": MODEL, "requirements.txt": "nothing\n"}
    mar = archived("base_handler", "--model-file", "net.py", "--requirements-file", "requirements.txt", files=files)
    imported(mar, "--input-shape", "2", "--tolerance", "1")
    assert "note: requirements.txt is ignored" in capsys.readouterr().out


def test_name_that_bundles_may_not_have(archived, capsys):
    mar = archived("base_handler", "--model-file", "net.py", files={"net.py": IMAGES}, name="Net.2")
    assert "name is 'Net.2'" in refused(mar, capsys, "--input-shape", "3,2,2")
    assert read(imported(mar, "--input-shape", "3,2,2", "--name", "Net_2")).name == "Net_2"


MANIFEST = {"runtime": "python", "model": {"modelName": "net", "modelVersion": "1", "handler": "base_handler"}}


def zipped(path: Path, *entries: tuple[str | zipfile.ZipInfo, bytes], manifest: object = MANIFEST) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("MAR-INF/MANIFEST.json", json.dumps(manifest))
        for name, content in entries:
            file.writestr(name, content)
    return path


def link(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    entry.external_attr = (stat.S_IFLNK | 0o777) << 16
    return entry


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("../escaped", "not a path inside"),
        ("a/../../escaped", "not a path inside"),
        ("/tmp/escaped", "not a path inside"),
        ("a\\..\\escaped", "not a path inside"),
        ("C:escaped", "not a path inside"),
        (link("escaped"), "is a link"),
        ("manifest.yaml", "needs for itself"),
        ("MAR-INF/MANIFEST.json", "twice"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_hostile_entries(tmp_path, capsys, entry, words):
    mar = zipped(tmp_path / "evil.mar", (entry, b"/etc/passwd"))
    assert words in refused(mar, capsys)
    assert not (tmp_path / "escaped").exists() and not (tmp_path.parent / "escaped").exists()


def test_size_is_counted_and_not_believed(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(archive, "_MOST_BYTES", 1 << 20)
    with zipfile.ZipFile(tmp_path / "bomb.mar", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("MAR-INF/MANIFEST.json", json.dumps(MANIFEST))
        file.writestr("zeros", bytes(2 << 20))
    assert "holds more than" in refused(tmp_path / "bomb.mar", capsys)


def test_too_many_entries(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(archive, "_MOST_ENTRIES", 3)
    mar = zipped(tmp_path / "many.mar", *((f"{number}.txt", b"") for number in range(3)))
    assert "has 4 entries" in refused(mar, capsys)


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        ([], "can't be used"),
        ({"model": {}}, "modelName"),
        ({"model": MANIFEST["model"] | {"modelFile": "../x.py"}}, "modelFile is '../x.py'"),
        ({"model": MANIFEST["model"] | {"serializedFile": "none.pt"}}, "serializedFile is 'none.pt'"),
        ({"model": MANIFEST["model"], "runtime": "LSP"}, "runtime LSP"),
        ({"model": MANIFEST["model"] | {"handler": "../h.py"}}, "'../h.py' is neither"),
        ({"model": MANIFEST["model"]}, "nothing to run"),
    ],
)
def test_wrong_manifests(tmp_path, capsys, manifest, words):
    assert words in refused(zipped(tmp_path / "net.mar", manifest=manifest), capsys)


def test_what_is_no_archive(tmp_path, capsys):
    (tmp_path / "x.mar").write_bytes(b"x")
    assert "isn't a zip file" in refused(tmp_path / "x.mar", capsys)
    with zipfile.ZipFile(tmp_path / "y.mar", "w") as file:
        file.writestr("model.py", "")
    assert "no model archive" in refused(tmp_path / "y.mar", capsys)


@pytest.mark.parametrize(("form", "name"), [("tgz", "net.tar.gz"), ("no-archive", "net")])
def test_other_formats_of_the_archiver_say_what_to_do(archived, tmp_path, capsys, form, name):
    archived("base_handler", "--model-file", "net.py", "--archive-format", form, files={"net.py": MODEL})
    assert "--archive-format default" in refused(tmp_path / name, capsys, "--input-shape", "2")


def test_damaged_archives(tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "net.mar", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("MAR-INF/MANIFEST.json", json.dumps(MANIFEST))
        file.writestr("ü.txt", b"abc" * 1000)
    whole = (tmp_path / "net.mar").read_bytes()
    start = whole.find("ü.txt".encode()) + len("ü.txt".encode())
    (tmp_path / "net.mar").write_bytes(whole[:start] + b"\xff" * 8 + whole[start + 8 :])
    assert "net.mar can't be unpacked" in refused(tmp_path / "net.mar", capsys)
    (tmp_path / "net.mar").write_bytes(whole.replace("ü".encode(), b"\xff\xfe"))
    assert "net.mar can't be unpacked" in refused(tmp_path / "net.mar", capsys)


def test_context_refuses_what_it_cannot_do(archived, capsys):
    code = "def handle(data, context):\n    context.set_response_status(404)\n    return data\n"
    assert "a handler can't set the status" in refused(
        archived("h.py", files={"h.py": code}), capsys, "--example", "{}"
    )


def test_new_directory_is_whole_or_not_there(tmp_path):
    with pytest.raises(RuntimeError), authoring.new_directory(tmp_path / "deep" / "bundle") as draft:
        (draft / "file").write_text("")
        raise RuntimeError
    assert list((tmp_path / "deep").iterdir()) == []
    (tmp_path / "deep" / "bundle").mkdir()
    with pytest.raises(BundleError, match="exists already"), authoring.new_directory(tmp_path / "deep" / "bundle"):
        pass
