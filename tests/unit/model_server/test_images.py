"""Images: what is accepted, what becomes of it, and what a request's rows are."""

import base64
import io
import subprocess
import sys
import zipfile
import zlib
from types import SimpleNamespace

import pytest
import torch
from bundle_making import ROOT
from hypothesis import given
from hypothesis import strategies as st
from model_server import bundle, images
from model_server.core import Request
from model_server.images import ImageSpec
from model_server.model import Model
from model_server.payload import BadRequest, ClassesSpec, NotFinite
from model_server.protocols import native, torchserve
from model_server.protocols.native import rows_of
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngImageFile

GREY = ImageSpec(width=4, height=4, channels=1, mean=(0.5,), std=(0.25,))
COLOUR = ImageSpec(width=6, height=4, channels=3, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
RED, BLUE = (255, 0, 0), (0, 0, 255)
SECRET = "4711-secret"


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def means(data: bytes, spec: ImageSpec = COLOUR) -> list[float]:
    """The mean of each channel."""
    [tensor] = spec.prepare([data])
    assert tensor.dtype == torch.float32 and tuple(tensor.shape) == spec.shape
    return tensor.mean((1, 2)).tolist()


def refusal(data: bytes, spec: ImageSpec = COLOUR) -> str:
    with pytest.raises(BadRequest) as caught:
        spec.prepare([data])
    assert SECRET not in str(caught.value)
    return str(caught.value)


def noise(width: int, height: int) -> Image.Image:
    values = torch.randint(0, 256, (height, width, 3), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    return Image.frombytes("RGB", (width, height), bytes(values.flatten().tolist()))


def test_values_are_normalised_and_in_place():
    image = Image.new("L", (4, 4), 0)
    image.putpixel((3, 1), 255)
    [tensor] = GREY.prepare([encoded(image)])
    expected = torch.full((1, 4, 4), -2.0)
    expected[0, 1, 3] = 2.0
    assert torch.equal(tensor, expected)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_every_format_is_read(kind):
    data = encoded(Image.new("RGB", (30, 20), RED), kind)
    assert means(data) == pytest.approx([1, 0, 0], abs=0.02)
    assert means(data, GREY) == pytest.approx([(0.299 - 0.5) / 0.25], abs=0.1)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (6, 4), colour) for colour in (RED, BLUE)]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert means(data) == pytest.approx([1, 0, 0], abs=0.02)


def test_modes():
    cmyk = encoded(Image.new("CMYK", (6, 4), (0, 255, 255, 0)), "JPEG")
    assert means(cmyk) == pytest.approx([1, 0, 0], abs=0.05)
    palette = Image.new("P", (6, 4), 1)
    palette.putpalette([0, 0, 0, *RED])
    assert means(encoded(palette)) == pytest.approx([1, 0, 0])
    assert means(encoded(Image.new("1", (6, 4), 1))) == pytest.approx([1, 1, 1])
    half = encoded(Image.new("I;16", (6, 4), 0x8000))
    assert means(half) == pytest.approx([128 / 255] * 3, abs=0.01)
    assert means(half, GREY) == pytest.approx([(128 / 255 - 0.5) / 0.25], abs=0.01)


@pytest.mark.parametrize(
    "image, options",
    [
        (Image.new("RGBA", (6, 4), (0, 0, 0, 0)), {}),
        (Image.new("LA", (6, 4), (0, 0)), {}),
        (Image.new("P", (6, 4), 0), {"transparency": 0}),
        (Image.new("RGB", (6, 4), 0), {"transparency": (0, 0, 0)}),
    ],
    ids=lambda value: getattr(value, "mode", ""),
)
def test_transparent_becomes_white(image, options):
    data = encoded(image, **options)
    assert means(data) == pytest.approx([1, 1, 1])
    assert means(data, GREY) == pytest.approx([2])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    turned = encoded(noise(6, 4), exif=exif)
    upright = encoded(ImageOps.exif_transpose(Image.open(io.BytesIO(turned))))
    assert torch.equal(COLOUR.prepare([turned])[0], COLOUR.prepare([upright])[0])
    assert (orientation == 1) == torch.equal(COLOUR.prepare([turned])[0], COLOUR.prepare([encoded(noise(6, 4))])[0])


def test_broken_exif_is_ignored_in_silence():
    data = encoded(Image.new("RGB", (6, 4), RED), exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09\x01\x12")
    program = (
        "import base64, sys\nfrom model_server.images import ImageSpec\n"
        "ImageSpec(4, 4, 1, (0.5,), (0.5,)).prepare([base64.b64decode(sys.argv[1])])"
    )
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", program, base64_of(data)],
        env={"PYTHONPATH": str(ROOT / "service")},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_shorter_side_and_centre():
    spec = ImageSpec(width=10, height=10, channels=3, mean=(0.0,) * 3, std=(1.0,) * 3, resize=10)
    image = Image.new("RGB", (80, 20), RED)
    image.paste(BLUE, (28, 0, 52, 20))
    assert means(encoded(image), spec) == pytest.approx([0, 0, 1])
    assert means(encoded(image.transpose(Image.Transpose.ROTATE_90)), spec) == pytest.approx([0, 0, 1])
    stretched = means(encoded(image), ImageSpec(10, 10, 3, (0.0,) * 3, (1.0,) * 3))
    assert stretched == pytest.approx([0.7, 0, 0.3], abs=0.02)


def test_without_scaling_the_centre_is_exact():
    spec = ImageSpec(width=4, height=6, channels=3, mean=(0.0,) * 3, std=(1.0,) * 3, resize=8)
    image = noise(8, 8)
    [cut] = spec.prepare([encoded(image)])
    [expected] = ImageSpec(4, 6, 3, (0.0,) * 3, (1.0,) * 3).prepare([encoded(image.crop((2, 1, 6, 7)))])
    assert torch.equal(cut, expected)


def _zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("image.png", encoded(noise(6, 4)))
    return file.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        f"<!doctype html><img src={SECRET}>".encode(),
        b'<svg xmlns="http://www.w3.org/2000/svg" width="6" height="4"/>',
        _zip(),
        b"%PDF-1.7\n",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 6 4\n",
        *(encoded(noise(6, 4), kind) for kind in ("TIFF", "PPM", "ICO", "TGA", "JPEG2000")),
    ],
    ids=["empty", "html", "svg", "zip", "pdf", "eps", "tiff", "ppm", "ico", "tga", "jpeg2000"],
)
def test_what_is_no_accepted_image(data):
    assert refusal(data) == "the image isn't an image: JPEG, PNG, WebP, GIF or BMP"


def test_only_the_accepted_formats_have_a_parser():
    program = (
        "import sys\nfrom model_server.images import ImageSpec\nfrom model_server.payload import BadRequest\n"
        "for data in (b'', b'GIF89a', b'II*\\0' + bytes(99), b'%!PS-Adobe'):\n"
        "    try:\n        ImageSpec(4, 4, 1, (0.5,), (0.5,)).prepare([data])\n    except BadRequest:\n        pass\n"
        "print(*sorted(name[4:-11] for name in sys.modules if name.endswith('ImagePlugin')))\n"
        "import model_server.bundle\nprint('torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONPATH": str(ROOT / "service")}, capture_output=True, text=True
    )
    # Pillow loads the one for PPM with the others; it is never asked. Nothing was decoded, so PyTorch isn't there.
    assert done.stdout.splitlines() == ["Bmp Gif Jpeg Png Ppm WebP", "False"] and done.stderr == ""


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("share", [0.3, 0.7])
def test_truncated(kind, share):
    data = encoded(noise(60, 40), kind)
    assert refusal(data[: int(len(data) * share)]) in (
        "the image is damaged or incomplete",
        "the image isn't an image: JPEG, PNG, WebP, GIF or BMP",
    )


def _claiming(kind: str, width: int, height: int) -> bytes:
    """A tiny file whose header promises a huge image."""
    data = bytearray(encoded(Image.new("L", (1, 1)), kind))
    at, order = {"PNG": (16, "big"), "GIF": (6, "little"), "BMP": (18, "little")}[kind]
    size = 2 if kind == "GIF" else 4
    data[at : at + 2 * size] = width.to_bytes(size, order) + height.to_bytes(size, order)
    if kind == "PNG":
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "BMP"])
@pytest.mark.parametrize("side", [7100, 50000])
def test_decompression_bomb(kind, side):
    assert refusal(_claiming(kind, side, side)) == "the image has more than 25000000 pixels"


def test_limit_of_scans():
    file = encoded(noise(32, 20), "JPEG", progressive=True)
    start = file.rindex(b"\xff\xda")
    # Its last scan over and over: each goes over the whole image again.
    many = file[:-2] + file[start:-2] * 100 + file[-2:]
    assert refusal(many) == "the image has more than 100 scans"
    with pytest.raises(BadRequest, match=r"^the image has more than 100 scans$"):
        images.read_rgb(bytearray(many))
    # What a camera attaches to a picture may hold anything.
    means(file[:-2] + file[start:-2] * 50 + file[-2:] + b"\xff\xda\x12" * 1000)


def test_limit_of_pixels():
    spec = ImageSpec(4, 4, 1, (0.5,), (0.5,), max_pixels=600)
    assert len(spec.prepare([encoded(noise(30, 20))])) == 1
    assert refusal(encoded(noise(31, 20)), spec) == "the image has more than 600 pixels"


def test_a_request_of_many_large_images_is_refused_before_anything_is_decoded():
    large = [_claiming("PNG", 4400, 4400 - number) for number in range(5)]
    with pytest.raises(BadRequest, match=r"^the images have more than 80000000 pixels together"):
        COLOUR.prepare(large)
    # Small files that would grow on their way count as what they become.
    spec = ImageSpec(224, 224, 1, (0.5,), (0.5,), resize=256)
    with pytest.raises(BadRequest, match="together"):
        spec.prepare([encoded(Image.new("L", (1, 300), value)) for value in range(5)])


@pytest.mark.parametrize(
    ("kind", "orientation", "options", "most"),
    [
        ("JPEG", 1, {}, 5),
        ("JPEG", 6, {}, 8.5),
        ("JPEG", 6, {"progressive": True, "subsampling": 0}, 10.5),
        ("PNG", 6, {"transparency": RED}, 8.5),
        ("WEBP", 6, {}, 17),
    ],
)
def test_memory_of_decoding(tmp_path, kind, orientation, options, most):
    """``most`` bytes for each pixel, as the documents say, however many images there are."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path, pixels = tmp_path / "large", 4000 * 2500
    path.write_bytes(encoded(Image.new("RGB", (4000, 2500), RED), kind, exif=exif, **options))
    program = (
        "import re, sys, torch\nfrom model_server.images import IMAGENET\n"
        "def peak(): return 1024 * int(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])\n"
        "small, large = (open(path, 'rb').read() for path in sys.argv[1:])\n"
        "IMAGENET.prepare([small])\nbefore = peak()\nIMAGENET.prepare([large, large + b'0'])\nprint(peak() - before)"
    )
    small = tmp_path / "small"
    small.write_bytes(encoded(Image.new("RGB", (300, 300)), kind))
    done = subprocess.run(
        [sys.executable, "-c", program, small, path],
        env={"PYTHONPATH": str(ROOT / "service")},
        capture_output=True,
        text=True,
        check=True,
    )
    # What else a process may take meanwhile is a few MB.
    assert int(done.stdout) < most * pixels + 8_000_000


def test_what_is_not_the_images_fault_is_no_refusal(monkeypatch):
    def fail(*_: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(images, "_upright", lambda image: image.nothing)
        with pytest.raises(AttributeError):
            COLOUR.prepare([ONE])
    monkeypatch.setattr(PngImageFile, "load", fail)
    with pytest.raises(MemoryError):
        COLOUR.prepare([ONE])


def test_an_image_that_comes_several_times_is_decoded_once(monkeypatch):
    read = []
    load = PngImageFile.load
    monkeypatch.setattr(PngImageFile, "load", lambda image: (read.append(image), load(image))[1])
    one, other = encoded(noise(30, 20), "PNG"), encoded(noise(20, 30), "PNG")
    alone = [COLOUR.prepare([data])[0] for data in (one, other)]
    count = len(set(map(id, read)))
    tensors = COLOUR.prepare([one, other, one, one])
    assert len(set(map(id, read))) == 2 * count
    for tensor, expected in zip(tensors, [alone[0], alone[1], alone[0], alone[0]], strict=True):
        assert torch.equal(tensor, expected)
    # Each row's own, as a model's preprocess may write into it.
    tensors[0].zero_()
    assert torch.equal(tensors[2], alone[0])


@pytest.mark.parametrize("size", [(1, 1_000_000), (1_000_000, 1)])
@pytest.mark.parametrize("resize", [0, 256])
def test_a_line_is_not_blown_up(size, resize):
    spec = ImageSpec(224, 224, 1, (0.5,), (0.5,), resize=resize)
    assert refusal(encoded(Image.new("1", size)), spec) == "the image is too long and narrow"


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(data):
    refusal(data)
    for start in (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"BM", b"RIFF\0\0\0\0WEBP"):
        refusal(start + data)


@given(
    st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "BMP"]),
    st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8),
)
def test_damaged_images_are_read_or_refused(kind, changes):
    data = bytearray(encoded(noise(20, 10), kind))
    for place, value in changes:
        data[int(place * len(data))] = value
    try:
        [tensor] = COLOUR.prepare([bytes(data)])
    except BadRequest:
        return
    assert tuple(tensor.shape) == COLOUR.shape


def test_one_bad_image_among_others_is_named():
    with pytest.raises(BadRequest, match=r"^image 2 of 3 isn't an image"):
        COLOUR.prepare([encoded(noise(6, 4)), b"no", encoded(noise(6, 4))])


def test_a_tensor_is_taken_as_it_is():
    tensor = torch.zeros(2, *COLOUR.shape)
    assert COLOUR.prepare(tensor) is tensor


def test_rows_of_json():
    data = encoded(noise(6, 4))
    text = base64_of(data)
    one, several = COLOUR.rows(text, 3), COLOUR.rows([text, f"data:image/jpeg;base64,{text}"], 3)
    assert (one.values, one.single) == ([data], True)
    assert (several.values, several.single) == ([data, data], False)


@pytest.mark.parametrize(
    "data, message",
    [
        (SECRET, "data isn't base64"),
        (["aGk=", "aGk"], r"data\[1\] isn't base64"),
        ("aGk=\n", "data isn't base64"),
        ("aG k=", "data isn't base64"),
        ("äöü=", "data isn't base64"),
        ("data:text/html;base64,aGk=", "data isn't base64"),
        ("", "data is empty"),
        ("data:image/png;base64,", "data is empty"),
        ([], "data has no rows"),
        (["aGk="] * 4, "data has 4 rows; this model takes at most 3"),
        ([["aGk="]], r"data\[0\] must be an image in base64"),
        ({SECRET: 1}, "data must be an image in base64 or a list"),
        (None, "data must be an image in base64 or a list"),
    ],
)
def test_json_that_is_refused(data, message):
    with pytest.raises(BadRequest, match=message) as caught:
        COLOUR.rows(data, 3)
    assert SECRET not in str(caught.value)


MODEL = SimpleNamespace(bundle=SimpleNamespace(input=COLOUR, max_rows=3))
ONE, TWO = encoded(noise(6, 4)), encoded(noise(5, 5), "BMP")


def asked(body: bytes, content_type: str | None = None):
    headers = {} if content_type is None else {"CONTENT_TYPE": content_type}
    rows = rows_of(Request("POST", "/predict", headers, body), MODEL)
    return rows.values, rows.single


def form(*parts: tuple[str, bytes], end: str = "--x--\r\n") -> bytes:
    return b"".join(
        f"--x\r\nContent-Disposition: form-data; {names}\r\n\r\n".encode() + data + b"\r\n" for names, data in parts
    ) + (end.encode())


FORM = "multipart/form-data; boundary=x"


@pytest.mark.parametrize(
    "content_type",
    ["image/png", "image/jpeg", "application/octet-stream", "application/x-www-form-urlencoded", "", None],
)
def test_a_raw_image_is_a_row(content_type):
    assert asked(ONE, content_type) == ([ONE], True)


@pytest.mark.parametrize("content_type", ["application/json", "application/json; charset=utf-8", "text/plain", None])
def test_json_stays_json(content_type):
    assert asked(b' {"data": ["%s"]}' % base64.b64encode(ONE), content_type) == ([ONE], False)


def test_files_of_a_form_are_rows_in_their_order():
    assert asked(form(('name="a"; filename="1.png"', ONE)), FORM) == ([ONE], True)
    parts = [
        ('name="a"; filename="1.png"', ONE),
        ('name="comment"', b"hello"),
        ('name="b"; filename=""', TWO),
        ('name="a"; filename="3.png"', ONE),
    ]
    assert asked(form(*parts), FORM) == ([ONE, TWO, ONE], False)


@pytest.mark.parametrize(
    "body, content_type, message",
    [
        (form(('name="a"; filename="b"', ONE)), "multipart/form-data", "isn't a form as its Content-Type"),
        (form(('name="a"; filename="b"', ONE)), "multipart/form-data; boundary=y", "isn't a form"),
        (form(('name="a"; filename="b"', ONE)), "multipart/form-data; boundary=ä", "isn't a form"),
        (form(('name="a"; filename="b"', ONE), end=""), FORM, "isn't a form"),
        (form(('name="a"', ONE)), FORM, "the form has no file"),
        (form(), FORM, "the form has no file"),
        (form(*[('name="a"; filename="b"', ONE)] * 4), FORM, "data has 4 rows; this model takes at most 3"),
        (form(*[('name="a"; filename="b"', b"")] * 1000), FORM, "too many parts"),
        (form(*[('name="a"', b"x")] * 20), FORM, "too many parts"),
        (b"", "image/png", "the body is empty"),
        (b"", FORM, "the body is empty"),
        (ONE, "application/json", "the body is not JSON"),
    ],
)
def test_bodies_that_are_refused(body, content_type, message):
    with pytest.raises(BadRequest, match=message):
        asked(body, content_type)


def test_a_form_may_have_as_many_files_as_a_request_rows():
    many = SimpleNamespace(bundle=SimpleNamespace(input=COLOUR, max_rows=64))
    models = SimpleNamespace(find=lambda name, version: many, default=many)
    for routes, path in ((native.routes, {}), (torchserve.routes, {"name": "m"})):
        headers = {"CONTENT_TYPE": FORM}
        for files, texts, fits in ((64, 16, True), (65, 0, False), (1, 80, False)):
            parts = [('name="data"; filename="a"', ONE)] * files + [('name="comment"', b"x")] * texts
            request = Request("POST", "/", headers, form(*parts))
            if fits:
                assert len(routes(models)[0].begin(request, path).rows) == files
            else:
                with pytest.raises(BadRequest, match="at most 64"):
                    routes(models)[0].begin(request, path)


@given(st.lists(st.sampled_from([b"--x", b"--", b"\r\n", b"\n", b'Content-Disposition: form-data; filename="a"', ONE])))
def test_garbled_forms_are_read_or_refused(pieces):
    try:
        values, _ = asked(b"".join(pieces), FORM)
    except BadRequest:
        return
    assert 1 <= len(values) <= 3


CLASSES = ClassesSpec(("cat", "dog", "cow"), top=2, activation="softmax")


def test_classes():
    scores = torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, 9.0]])
    first, second = CLASSES.values(scores)
    chances = scores[0].softmax(0).tolist()
    assert first == {
        "class": "dog",
        "probability": pytest.approx(chances[1]),
        "top": [
            {"class": "dog", "probability": pytest.approx(chances[1])},
            {"class": "cow", "probability": pytest.approx(chances[2])},
        ],
    }
    assert second["class"] == "cow"
    [plain] = ClassesSpec(("cat", "dog"), top=1, activation="none").values(torch.tensor([[0.75, 0.25]]))
    assert plain == {"class": "cat", "probability": 0.75, "top": [{"class": "cat", "probability": 0.75}]}


def test_outputs_that_are_no_classes():
    with pytest.raises(TypeError, match="the manifest promises float32 of shape \\[3\\]"):
        CLASSES.values(torch.zeros(2, 4))
    with pytest.raises(TypeError):
        CLASSES.check(torch.zeros(2, 3, dtype=torch.float64))
    with pytest.raises(TypeError, match="the model returned tuple and no tensor"):
        CLASSES.check((torch.zeros(2, 3),))


def model(forward, spec=GREY, output=CLASSES, **methods) -> Model:
    module = type("Module", (torch.nn.Module,), {"forward": forward, **methods})()
    fields = {"max_batch_rows": 8, "max_delay_ms": 0.0, "input": spec, "output": output}
    return Model(module, SimpleNamespace(name="m", version="1", **fields))


@pytest.mark.parametrize("activation", ["softmax", "none"])
def test_a_classifier_without_a_finite_answer_says_so_in_every_form(activation):
    spec = ClassesSpec(CLASSES.labels, 2, activation)
    scores = torch.tensor([[1.0, 2.0, 0.0], [1.0, float("nan"), 0.0]])
    broken = model(lambda module, images: scores, output=spec)
    images = torch.zeros(2, *GREY.shape)
    with pytest.raises(NotFinite, match="no finite answer"):
        broken.predict([images])
    [tensor] = broken.predict([images], wants_tensor=True)
    with pytest.raises(NotFinite, match="no finite answer"):
        spec.likeliest(tensor, 3)
    assert [number for _, number in spec.likeliest(scores[:1], 9)[0]] == [1, 0, 2]


def test_a_preprocess_gets_pixels_as_it_gets_files():
    seen = []

    def preprocess(module, rows):
        seen.append([(type(row), row.dtype, tuple(row.shape)) for row in rows])
        return torch.stack(rows)

    both = model(lambda module, images: torch.zeros(len(images), 3), preprocess=preprocess)
    files = both.prepare([encoded(noise(6, 4))] * 2)
    both.predict([files])
    both.predict([torch.zeros(1, *GREY.shape), torch.zeros(1, *GREY.shape)])
    assert seen[0] == seen[1] == [(torch.Tensor, torch.float32, GREY.shape)] * 2


IMAGE_INPUT = "input: {kind: image, width: 8, height: 6, channels: 1, mean: [0.5], std: [0.25], resize: 10}"
CLASSES_OUTPUT = "output: {kind: classes, labels: [cat, dog, '3'], top: 2, activation: none}"
OLD_INPUT = "input:\n  shape: [2]\n  dtype: float32\n  features: [x1, x2]"
OLD_OUTPUT = "output:\n  shape: [1]\n  dtype: float32"


def test_manifest(edit):
    edit("manifest.yaml", "reference: reference.json\n", "")
    edit("manifest.yaml", OLD_INPUT, IMAGE_INPUT)
    found = bundle.read(edit("manifest.yaml", OLD_OUTPUT, CLASSES_OUTPUT))
    assert found.input == ImageSpec(8, 6, 1, (0.5,), (0.25,), resize=10)
    assert (found.input.shape, found.input.kind) == ((1, 6, 8), "image")
    assert found.output == ClassesSpec(("cat", "dog", "3"), 2, "none")
    assert (found.output.shape, found.output.dtype) == ((3,), "float32")


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("kind: image", "kind: sound", "input.kind is 'sound'"),
        ("kind: classes", "kind: image", "output.kind is 'image'"),
        ("width: 8", "width: 0", "input.width is 0"),
        ("channels: 1", "channels: 4", "input.channels is 4; it must be 1"),
        (
            "channels: 1",
            "channels: 3",
            r"input.mean is \[0.5\]; it must be a list with a number from 0.0 to 1 for each",
        ),
        ("mean: [0.5], ", "", "input.mean is missing"),
        ("std: [0.25]", "std: [0]", r"input.std is \[0\]"),
        ("std: [0.25]", "std: [.nan]", r"input.std is \[nan\]"),
        ("resize: 10", "resize: 7", "input.resize is 7; it must be 8 at least"),
        ("resize: 10", "max_pixels: 40", "input.max_pixels is 40"),
        ("resize: 10", "shape: [8]", "input.shape is not a known field"),
        ("'3'", "3", "output.labels is .* in quotes"),
        ("'3'", "cat", "output.labels is .* different names"),
        ("top: 2", "top: 4", "output.top is 4; it must be a whole number from 1 to 3"),
        ("activation: none", "activation: relu", "output.activation is 'relu'; it must be one of softmax, none"),
        ("activation: none", "shape: [3]", "output.shape is not a known field"),
    ],
)
def test_manifest_that_is_refused(edit, old, new, message):
    edit("manifest.yaml", OLD_INPUT, IMAGE_INPUT)
    edit("manifest.yaml", OLD_OUTPUT, CLASSES_OUTPUT)
    with pytest.raises(bundle.BundleError, match=message):
        bundle.read(edit("manifest.yaml", old, new))
