"""Models whose rows are images: what clients may send, and the tensors that are made of it."""

import base64
import io
import re
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

# Pillow would import the parsers of all formats to find this one.
import PIL.WebPImagePlugin  # noqa: F401
from PIL import Image

from model_server.payload import BadRequest, Rows, check_count

if TYPE_CHECKING:
    import torch

# Told apart by their first bytes. Every other format has a parser that nobody needs to be able to reach.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
# Decoding takes up to 17 bytes for each (WebP; 10 and less for other formats), in each worker: with two of them the
# rest of a container of 1 GiB is enough for a model.
DEFAULT_MAX_PIXELS = 25_000_000
# Of one image, and of all images of a request. Pillow itself refuses or complains above this.
MOST_PIXELS = 80_000_000
# Of a JPEG. Progressive ones have about ten; each goes over all pixels and may take no more than 42 bytes of the file.
_MOST_SCANS = 100

_ACCEPTED = "an image: JPEG, PNG, WebP, GIF or BMP"
_DATA_URL = re.compile(r"data:image/[\w.+-]{1,40};base64,")
# Two bytes alone also turn up by chance in what cameras attach. The length must fit the number of components.
_SCAN = re.compile(rb"\xff\xda\x00(?:\x08\x01|\x0a\x02|\x0c\x03|\x0e\x04)")
_ORIENTATION = 0x0112
# By the value of the EXIF tag; 1 is upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_MODES = {1: "L", 3: "RGB"}

# About what clients send: nobody who reads the service's log can do anything about it.
warnings.filterwarnings("ignore", module="PIL")


@dataclass(frozen=True)
class ImageSpec:
    """Images of any size, scaled to ``width`` x ``height`` and normalised: (value from 0 to 1 - mean) / std.

    ``channels`` is 1 (grey) or 3 (red, green, blue); ``mean`` and ``std`` have a number for each. With ``resize`` the
    shorter side is scaled to that many pixels and the centre cut out; with 0 the whole image is scaled, whatever its
    proportions. What is transparent becomes white. No image of more than ``max_pixels`` is decoded,
    and no request whose images have more than MOST_PIXELS together.
    """

    width: int
    height: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resize: int = 0
    max_pixels: int = DEFAULT_MAX_PIXELS

    kind = "image"
    dtype = "float32"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor that one image becomes."""
        return (self.channels, self.height, self.width)

    def describe(self) -> str:
        """For messages."""
        return _ACCEPTED

    def rows(self, data: Any, max_rows: int) -> Rows:
        """One image as base64, or a list of 1 to ``max_rows`` of them; the values are bytes. Raises BadRequest."""
        single = type(data) is str
        if not single and type(data) is not list:
            raise BadRequest("data must be an image in base64 or a list of such images")
        texts = [data] if single else data
        check_count(len(texts), max_rows)
        return Rows(
            [_from_base64(text, "data" if single else f"data[{index}]") for index, text in enumerate(texts)], single
        )

    def prepare(self, rows: Sequence[Any]) -> Sequence[Any]:
        """A float32 tensor of shape [channels, height, width] for each encoded image. Raises BadRequest.

        A tensor of shape [rows, channels, height, width] is taken to be that already.
        """
        if not isinstance(rows, list):
            return rows
        # An image that comes several times is opened and decoded once.
        names = {
            data: "the image" if len(rows) == 1 else f"image {number} of {len(rows)}"
            for number, data in enumerate(rows, 1)
        }
        images = {data: self._opened(data, name) for data, name in names.items()}
        # A small body can hold many large images, and each takes its time.
        if sum(map(self._work, images.values())) > MOST_PIXELS:
            raise BadRequest(f"the images have more than {MOST_PIXELS} pixels together; send fewer at a time")
        # Each is let go of before the next is decoded.
        tensors = {data: self._prepared(images.pop(data), name) for data, name in names.items()}
        return [tensors[data].clone() for data in rows]

    def tensor(self, image: Image.Image) -> "torch.Tensor":
        """Float32 of shape [channels, height, width] of an image that is the right way up.

        Its mode is RGBA or the one that the model takes. Raises BadRequest.
        """
        self._check_proportions(image, "the image")
        return self._normalised(image)

    def schema(self) -> dict[str, Any]:
        """The JSON schema of one row."""
        return {"type": "string", "contentEncoding": "base64", "description": _ACCEPTED[0].upper() + _ACCEPTED[1:]}

    def _prepared(self, image: Image.Image, where: str) -> "torch.Tensor":
        return self._normalised(_decoded(image, where, _MODES[self.channels]))

    def _normalised(self, image: Image.Image) -> "torch.Tensor":
        image = _on_white(self._fitted(image), _MODES[self.channels])
        # Not at the top: processes that decode nothing do without PyTorch.
        import torch

        pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
        values = pixels.view(self.height, self.width, self.channels).permute(2, 0, 1) / 255
        mean, std = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (self.mean, self.std))
        return (values - mean) / std

    def _opened(self, data: bytes, where: str) -> Image.Image:
        """An image of an accepted size, of which nothing is decoded yet."""
        image = _opened(data, where, self.max_pixels)
        self._check_proportions(image, where)
        return image

    def _check_proportions(self, image: Image.Image, where: str) -> None:
        if self._work(image) > self.max_pixels:
            raise BadRequest(f"{where} is too long and narrow")

    def _work(self, image: Image.Image) -> float:
        """How many pixels the image has, or gets on its way to the right size where those are more.

        A line one pixel wide would grow beyond all memory.
        """
        side, short, long = self.resize or max(self.width, self.height), min(image.size), max(image.size)
        return max(short * long, side * long * max(1, side / short))

    def _fitted(self, image: Image.Image) -> Image.Image:
        if not self.resize:
            return image.resize((self.width, self.height), Image.Resampling.BILINEAR)
        short = min(image.size)
        width, height = self.resize * image.width // short, self.resize * image.height // short
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        left, top = round((width - self.width) / 2), round((height - self.height) / 2)
        return image.crop((left, top, left + self.width, top + self.height))


# What networks trained on ImageNet mostly expect, and what TorchServe's image_classifier does with an image.
IMAGENET = ImageSpec(
    width=224, height=224, channels=3, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), resize=256
)


def read_rgb(data: bytes) -> Image.Image:
    """An encoded image in RGB, decoded, the right way up, on white where it is transparent. Raises BadRequest."""
    image = _opened(data, "the image", DEFAULT_MAX_PIXELS)
    return _on_white(_decoded(image, "the image", "RGB"), "RGB")


def _opened(data: bytes, where: str, max_pixels: int) -> Image.Image:
    """An image of which nothing is decoded yet."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.DecompressionBombError:
        raise BadRequest(f"{where} has more than {max_pixels} pixels") from None
    except MemoryError:
        raise
    # Pillow raises nearly anything for bytes that aren't what they begin like.
    except Exception:
        raise BadRequest(f"{where} isn't {_ACCEPTED}") from None
    if image.width * image.height > max_pixels:
        raise BadRequest(f"{where} has more than {max_pixels} pixels")
    if data.startswith(b"\xff\xd8") and len(_SCAN.findall(data)) > _MOST_SCANS:
        raise BadRequest(f"{where} has more than {_MOST_SCANS} scans")
    return image


def _decoded(image: Image.Image, where: str, mode: str) -> Image.Image:
    """The whole image the right way up: in ``mode``, or in RGBA where it is transparent."""
    try:
        image.load()
    except MemoryError:
        raise
    # As above. What follows works on pixels that are there, so that its failures are our own.
    except Exception:
        raise BadRequest(f"{where} is damaged or incomplete") from None
    return _converted(_upright(image), mode)


def _instead(image: Image.Image, made: Image.Image) -> Image.Image:
    """``made`` of ``image``, whose memory is given back at once: each copy is as large as a whole picture."""
    if made is not image:
        image.close()
    return made


def _from_base64(text: Any, where: str) -> bytes:
    if type(text) is not str:
        raise BadRequest(f"{where} must be an image in base64")
    prefix = _DATA_URL.match(text)
    try:
        data = base64.b64decode(text[prefix.end() :] if prefix else text, validate=True)
    except ValueError:
        raise BadRequest(f"{where} isn't base64, or has characters such as line breaks in it") from None
    if not data:
        raise BadRequest(f"{where} is empty")
    return data


def _upright(image: Image.Image) -> Image.Image:
    orientation = None
    # An image whose EXIF data are broken is shown as it is by everyone else, too.
    with suppress(Exception):
        orientation = image.getexif().get(_ORIENTATION)
    turn = _TURNS.get(orientation)
    return image if turn is None else _instead(image, image.transpose(turn))


def _converted(image: Image.Image, mode: str) -> Image.Image:
    if image.mode.startswith("I"):
        # 16 bits of grey, which Pillow would cut off at 255 instead of scaling them.
        image = _instead(image, image.point(lambda value: value / 256))
        image = _instead(image, image.convert("L"))
    # Transparency is kept until the image is small: each step costs as much memory as the image.
    wanted = "RGBA" if image.has_transparency_data else mode
    return image if image.mode == wanted else _instead(image, image.convert(wanted))


def _on_white(image: Image.Image, mode: str) -> Image.Image:
    if image.mode == mode:
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert(mode)
