"""Reading and verifying a bundle, up to the point where PyTorch is needed."""

import errno
import hashlib
import json
import os
import re
import stat
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import yaml

from model_server.bodies import BytesSpec, JsonSpec
from model_server.images import DEFAULT_MAX_PIXELS, MOST_PIXELS, ImageSpec
from model_server.payload import DTYPES, ClassesSpec, InputSpec, OutputSpec, TensorSpec
from model_server.reference import Reference
from model_server.reference import parse as parse_reference

MANIFEST = "manifest.yaml"
# So that Prometheus's limit on a colour's series holds: each has about thirty.
MOST_WATCHED = 200
EXAMPLES = "examples.json"
CHECKSUMS = "SHA256SUMS"

WEIGHTS_FORMATS = ("state_dict", "safetensors", "torchscript")
_FORMATS_BY_SUFFIX = {".pth": "state_dict", ".pt": "state_dict", ".safetensors": "safetensors"}

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,62}")
_VERSION = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+-]{0,62}")
_METRIC = re.compile(r"[a-z][a-z0-9_]{0,62}")
_LONGEST_MESSAGE = 2000
_LONGEST_SIDE = 8192
# What the machine is short of or stumbles over, whatever the bundle: another start may find it better.
_PASSING = (errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_CHECKSUM_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")


class BundleError(Exception):
    """A bundle that can't be served; the message names the bundle, the file or field, and what is wrong with it."""


@dataclass(frozen=True)
class Example:
    """A request with the answer that it must get; ``tolerance`` is absolute and applies to numbers."""

    request: Any
    response: Any
    tolerance: float


@dataclass(frozen=True)
class Entry:
    """The class of a model: the bundle's file that has it, its name, and what it is made with."""

    file: str
    class_name: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Handler:
    """A TorchServe handler. Without ``class_name``: the file's function ``handle``, or its only class that has one."""

    file: str
    class_name: str | None
    config: str | None


@dataclass(frozen=True)
class Speed:
    """Faster variants of a model; ``tolerance`` is how far their outputs on the examples may be from the original's."""

    torchscript: bool = False
    channels_last: bool = False
    dtype: str | None = None
    quantize: str | None = None
    tolerance: float = 1e-3

    @property
    def options(self) -> tuple[str, ...]:
        """What is asked for, in the manifest's words: ``("torchscript: true",)``."""
        asked = {
            "torchscript: true": self.torchscript,
            "channels_last: true": self.channels_last,
            f"dtype: {self.dtype}": self.dtype,
            f"quantize: {self.quantize}": self.quantize,
        }
        return tuple(option for option, wanted in asked.items() if wanted)


@dataclass(frozen=True)
class Bundle:
    """A verified bundle. ``digest`` is ``sha256:<hex>`` of the file SHA256SUMS.

    Of a bundle that holds several, everything but the directory, the digest, the name, the version and the
    description is the first one's.
    """

    directory: Path
    digest: str
    name: str
    version: str
    description: str
    entry: Entry | None
    weights: str | None
    weights_format: str
    handler: Handler | None
    speed: Speed
    device: str
    input: InputSpec
    output: OutputSpec
    max_rows: int
    max_batch_rows: int
    max_delay_ms: float
    metrics: dict[str, float]
    examples: tuple[Example, ...]
    reference: Reference | None = None
    parts: tuple["Bundle", ...] = ()

    @property
    def models(self) -> tuple["Bundle", ...]:
        """The models that it holds; the first is the default."""
        return self.parts or (self,)

    @property
    def label(self) -> str:
        """For messages: ``bundle simplemodel 1.0.0``."""
        return f"bundle {self.name} {self.version}"


def read(directory: Path) -> Bundle:
    """Read the bundle in ``directory`` and verify everything that needs no PyTorch.

    Raises BundleError; OSError or MemoryError where the machine is at fault and another try may succeed.
    """
    return _explained(directory, _read_verified)


def read_draft(directory: Path) -> Bundle:
    """Read the manifest of a bundle that still lacks examples and checksums. Raises BundleError."""
    return _explained(directory, lambda _, manifest: _parse(directory, "", manifest, ()))


def passing(error: BaseException | None) -> BaseException | None:
    """What the machine is at fault for, where that is behind ``error``: another try may succeed."""
    while error is not None:
        if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno in _PASSING):
            return error
        error = error.__cause__
    return None


def _explained(directory: Path, reading: Callable[[Path, bytes], Bundle]) -> Bundle:
    if not directory.is_dir():
        raise BundleError(f"bundle: {directory} is not a directory")
    label = "bundle"
    try:
        manifest_bytes = _read_file(directory, MANIFEST)
        # Who is being complained about belongs into every message, also into one about a checksum.
        label = _label(manifest_bytes)
        return reading(directory, manifest_bytes)
    except _Problem as problem:
        raise BundleError(f"{label}: {problem}"[:_LONGEST_MESSAGE]) from None
    except MemoryError:
        raise
    except OSError as error:
        if passing(error) is not None:
            raise
        raise BundleError(f"{label}: {error.filename or 'a file'} can't be read: {error.strerror}") from None
    # Whatever else a file can hold that trips the code above: the bundle is at fault, and another start won't help.
    except Exception as error:
        summary = " ".join(f"{type(error).__name__}: {error}".split())
        raise BundleError(f"{label}: can't be read: {summary}"[:_LONGEST_MESSAGE]) from error


class _Problem(Exception):
    """What is wrong with a bundle, without its name."""


def _read_verified(directory: Path, manifest: bytes) -> Bundle:
    digest = _verify_checksums(directory)
    return _parse(directory, digest, manifest, _examples(_read_file(directory, EXAMPLES)))


def _label(manifest: bytes) -> str:
    try:
        fields = yaml.safe_load(manifest)
        return f"bundle {fields['name']} {fields['version']}"[:200]
    # PyYAML raises nearly anything: ValueError for a date that doesn't exist, RecursionError for deep nesting.
    except Exception:
        return "bundle"


def _read_file(directory: Path, name: str) -> bytes:
    path = directory / name
    try:
        if not stat.S_ISREG(path.lstat().st_mode):
            raise _Problem(f"{name} is not an ordinary file")
        return path.read_bytes()
    except FileNotFoundError:
        raise _Problem(f"{name} is missing") from None


def _verify_checksums(directory: Path) -> str:
    sums = _read_file(directory, CHECKSUMS)
    expected: dict[str, str] = {}
    try:
        lines = sums.decode().splitlines()
    except UnicodeDecodeError:
        raise _Problem(f"{CHECKSUMS} is not UTF-8 text") from None
    for number, line in enumerate(lines, 1):
        match = _CHECKSUM_LINE.fullmatch(line)
        if match is None:
            raise _Problem(f"{CHECKSUMS} line {number} is not '<sha256>  <file>'")
        name = _inner_path(match[2], f"{CHECKSUMS} line {number}")
        if name in expected:
            raise _Problem(f"{CHECKSUMS} lists {name} twice")
        expected[name] = match[1]
    present = _files(directory) - {CHECKSUMS}
    for name in sorted(expected.keys() - present):
        raise _Problem(f"{name} is listed in {CHECKSUMS} but missing")
    for name in sorted(present - expected.keys()):
        raise _Problem(f"{name} is not listed in {CHECKSUMS}")
    for name, checksum in expected.items():
        with open(directory / name, "rb") as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
        if actual != checksum:
            raise _Problem(
                f"{name} doesn't match its checksum in {CHECKSUMS} (expected {checksum}, got {actual}); "
                "deliver the bundle again"
            )
    return "sha256:" + hashlib.sha256(sums).hexdigest()


def _files(directory: Path) -> set[str]:
    """Every file below ``directory``, relative to it; anything but files and directories is an error."""
    found = set()
    # What can't be listed would otherwise count as empty.
    for folder, subfolders, names in os.walk(directory, onerror=_raise):
        for name in (*subfolders, *names):
            path = Path(folder, name)
            relative = path.relative_to(directory).as_posix()
            mode = path.lstat().st_mode
            if stat.S_ISREG(mode):
                found.add(relative)
            elif not stat.S_ISDIR(mode):
                raise _Problem(f"{relative} is a link or a special file; a bundle holds ordinary files only")
    return found


def _raise(error: OSError) -> NoReturn:
    raise error


def _inner_path(text: str, where: str) -> str:
    path = PurePosixPath(text)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in text or "\0" in text:
        raise _Problem(f"{where}: {text!r} is not a path inside the bundle")
    return path.as_posix()


def _parse(directory: Path, digest: str, manifest: bytes, examples: tuple[Example, ...]) -> Bundle:
    try:
        document = yaml.load(manifest, _Loader)
    except (_Problem, MemoryError):
        raise
    except Exception as error:
        raise _Problem(f"{MANIFEST} is not YAML: {' '.join(str(error).split())}") from None
    top = _Fields(document, "")
    if top.has("models"):
        return _collection(directory, digest, top, examples)
    batching = _Fields(top.take("batching"), "batching")
    max_rows = batching.whole("max_rows", 1, 65536)
    handler = _handler(top, directory)
    weights = top.file("weights", directory) if top.has("weights") else None
    bundle = Bundle(
        directory=directory,
        digest=digest,
        name=top.text("name", _NAME),
        version=top.text("version", _VERSION),
        description=top.text("description"),
        handler=handler,
        entry=_entry(top, directory),
        weights=weights,
        weights_format=_weights_format(top, None if handler else weights),
        speed=_speed(top),
        device=top.choice("device", ("cpu", "auto"), "cpu"),
        input=_input(top.take("input")),
        output=_output(top.take("output")),
        max_rows=max_rows,
        max_batch_rows=batching.whole("max_batch_rows", 1, 65536, default=max_rows),
        max_delay_ms=batching.number("max_delay_ms", 0, 1000, default=0),
        metrics=_metrics(top.take("metrics", {})),
        examples=examples,
    )
    if top.has("reference") and digest:
        bundle = replace(bundle, reference=_reference(top, bundle))
    for fields in (top, batching):
        fields.finish()
    _check_code(bundle)
    return bundle


def _reference(top: "_Fields", bundle: Bundle) -> Reference:
    name = top.file("reference", bundle.directory)
    spec = bundle.input
    if not isinstance(spec, TensorSpec) or len(spec.shape) != 1:
        raise _Problem(f"{MANIFEST}: reference can't be used here; it's for inputs that are one list of numbers a row")
    try:
        found = parse_reference(_read_file(bundle.directory, name))
    except ValueError as error:
        raise _Problem(f"{name}: {error}") from None
    names = tuple(feature.name for feature in found.features)
    if len(names) != spec.shape[0]:
        raise _Problem(f"{name}: features has {len(names)} of them; the manifest's input has {spec.shape[0]}")
    if spec.features and names != spec.features:
        raise _Problem(f"{name}: features are {list(names)}; the manifest's input.features are {list(spec.features)}")
    return found


def _collection(directory: Path, digest: str, top: "_Fields", examples: tuple[Example, ...]) -> Bundle:
    """A bundle whose directories are bundles."""
    name, version, description = top.text("name", _NAME), top.text("version", _VERSION), top.text("description")
    listed = top.take("models")
    top.finish()
    if not isinstance(listed, list) or not listed or not all(isinstance(item, str) for item in listed):
        raise top.fail("models", listed, "a list of the models' names, each a directory of this bundle")
    # Some of what is made of names knows one case, or no hyphens: acc_<name>, for example.
    if len({item.lower().replace("-", "_") for item in listed}) < len(listed):
        raise top.fail("models", listed, "a list of names that differ, in more than case, - and _")
    parts = []
    for item in listed:
        if not _NAME.fullmatch(item):
            raise top.fail("models", listed, f"a list of names that match ^{_NAME.pattern}$")
        parts.append(_part(directory / item, item, bool(digest)))
    watched = sum(len(part.reference.features) for part in parts if part.reference)
    if watched > MOST_WATCHED:
        raise _Problem(
            f"{MANIFEST}: the references of its models have {watched} features together; at most {MOST_WATCHED} can be "
            "watched for drift in one bundle: leave out a reference"
        )
    # What the collection answers on /predict, its first model does.
    own = tuple(example for example in examples if example not in parts[0].examples)
    parts[0] = replace(parts[0], examples=parts[0].examples + own)
    return replace(
        parts[0],
        directory=directory,
        digest=digest,
        name=name,
        version=version,
        description=description,
        parts=tuple(parts),
    )


def _part(directory: Path, name: str, verify: bool) -> Bundle:
    if not directory.is_dir():
        raise _Problem(f"{MANIFEST}: models names {name}, which is not a directory of the bundle")
    try:
        manifest = _read_file(directory, MANIFEST)
        part = _read_verified(directory, manifest) if verify else _parse(directory, "", manifest, ())
    except _Problem as problem:
        raise _Problem(f"{name}: {problem}") from None
    if part.parts:
        raise _Problem(f"{name}: {MANIFEST}: models can't be used here; only the outermost manifest may list models")
    if part.name != name:
        raise _Problem(f"{name}: {MANIFEST}: name is {part.name!r}; it must be {name!r}, as the directory is called")
    return part


class _Loader(yaml.SafeLoader):
    """YAML without a field that stands twice, of which only the last one would count."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in seen:
                line = key.start_mark.line + 1
                raise _Problem(f"{MANIFEST}: {key.value} is there a second time, in line {line}; remove one of the two")
            seen.add((key.tag, key.value))
        return node


class _Fields:
    """One mapping of the manifest, taken apart field by field; ``finish`` complains about what nobody asked for.

    A field without a value counts as one that isn't there.
    """

    def __init__(self, document: Any, where: str) -> None:
        if not isinstance(document, dict):
            raise _Problem(f"{MANIFEST}: {where or 'the document'} must be a mapping")
        self._values = {key: value for key, value in document.items() if value is not None}
        self._unknown = dict.fromkeys(document)
        self._where = where

    def _path(self, key: Any) -> str:
        return f"{self._where}.{key}" if self._where else str(key)

    def fail(self, key: str, value: Any, wanted: str) -> _Problem:
        return _Problem(f"{MANIFEST}: {self._path(key)} is {value!r}; it must be {wanted}")

    def take(self, key: str, default: Any = None) -> Any:
        self._unknown.pop(key, None)
        value = self._values.get(key, default)
        if value is None:
            raise _Problem(f"{MANIFEST}: {self._path(key)} is missing")
        return value

    def text(self, key: str, pattern: re.Pattern[str] | None = None) -> str:
        value = self.take(key)
        if not isinstance(value, str):
            raise self.fail(key, value, "text; put it in quotes")
        if pattern is not None and not pattern.fullmatch(value):
            raise self.fail(key, value, f"text that matches ^{pattern.pattern}$")
        return value

    def has(self, key: str) -> bool:
        """Whether the field is there."""
        self._unknown.pop(key, None)
        return key in self._values

    def choice(self, key: str, choices: tuple[str, ...], default: str | None = None) -> str:
        value = self.take(key, default)
        if value not in choices:
            raise self.fail(key, value, f"one of {', '.join(choices)}")
        return value

    def flag(self, key: str) -> bool:
        value = self.take(key, False)
        if type(value) is not bool:
            raise self.fail(key, value, "true or false")
        return value

    def number(self, key: str, low: float, high: float, default: float | None = None) -> float:
        value = self.take(key, default)
        if type(value) not in (int, float) or not low <= value <= high:
            raise self.fail(key, value, f"a number from {low} to {high}")
        return float(value)

    def whole(self, key: str, low: int, high: int, default: int | None = None) -> int:
        value = self.take(key, default)
        if type(value) is not int or not low <= value <= high:
            raise self.fail(key, value, f"a whole number from {low} to {high}")
        return value

    def identifier(self, key: str) -> str:
        value = self.text(key)
        if not value.isidentifier():
            raise self.fail(key, value, "the name of a class")
        return value

    def file(self, key: str, directory: Path) -> str:
        name = _inner_path(self.text(key), f"{MANIFEST}: {self._path(key)}")
        if not (directory / name).is_file():
            raise self.fail(key, name, "a file of the bundle")
        return name

    def finish(self) -> None:
        for key in self._unknown:
            raise _Problem(f"{MANIFEST}: {self._path(key)} is not a known field")


def _entry(top: _Fields, directory: Path) -> Entry | None:
    if not top.has("entry"):
        return None
    fields = _Fields(top.take("entry"), "entry")
    entry = Entry(fields.file("file", directory), fields.identifier("class"), fields.take("arguments", {}))
    fields.finish()
    if not isinstance(entry.arguments, dict) or not all(isinstance(key, str) for key in entry.arguments):
        raise _Problem(f"{MANIFEST}: entry.arguments must be a mapping of argument names to values")
    return entry


def _handler(top: _Fields, directory: Path) -> Handler | None:
    if not top.has("handler"):
        return None
    fields = _Fields(top.take("handler"), "handler")
    handler = Handler(
        file=fields.file("file", directory),
        class_name=fields.identifier("class") if fields.has("class") else None,
        config=fields.file("config", directory) if fields.has("config") else None,
    )
    fields.finish()
    return handler


def _weights_format(top: _Fields, weights: str | None) -> str:
    if weights is None:
        return top.choice("weights_format", ("none",), "none")
    default = _FORMATS_BY_SUFFIX.get(PurePosixPath(weights).suffix)
    if default is None and not top.has("weights_format"):
        raise _Problem(
            f"{MANIFEST}: weights_format is missing; {weights} could hold anything, say which of "
            f"{', '.join(WEIGHTS_FORMATS)} it is"
        )
    return top.choice("weights_format", WEIGHTS_FORMATS, default)


def _speed(top: _Fields) -> Speed:
    fields = _Fields(top.take("speed", {}), "speed")
    speed = Speed(
        torchscript=fields.flag("torchscript"),
        channels_last=fields.flag("channels_last"),
        dtype=fields.choice("dtype", ("bfloat16",)) if fields.has("dtype") else None,
        quantize=fields.choice("quantize", ("dynamic",)) if fields.has("quantize") else None,
        tolerance=fields.number("tolerance", 0, sys.float_info.max, default=1e-3),
    )
    fields.finish()
    if speed.dtype and speed.quantize:
        raise _Problem(f"{MANIFEST}: speed.dtype and speed.quantize exclude each other; choose one")
    return speed


def _check_code(bundle: Bundle) -> None:
    """Whether the fields that say what code runs go together."""
    if bundle.handler is not None:
        if bundle.speed.options:
            raise _Problem(f"{MANIFEST}: speed can't be used with handler, which runs the model itself")
        if bundle.device != "cpu":
            raise _Problem(f"{MANIFEST}: device is {bundle.device!r}; with handler it must be 'cpu'")
    elif bundle.weights_format == "torchscript":
        if bundle.entry is not None:
            raise _Problem(f"{MANIFEST}: entry can't be used with torchscript, whose file holds the code too")
    elif bundle.entry is None:
        raise _Problem(f"{MANIFEST}: entry is missing; only torchscript weights and handlers go without")
    for option in ("quantize", "torchscript"):
        # Both make what only a CPU can run.
        if bundle.device != "cpu" and getattr(bundle.speed, option):
            raise _Problem(f"{MANIFEST}: device is {bundle.device!r}; with speed.{option} it must be 'cpu'")


def _input(value: Any) -> InputSpec:
    fields = _Fields(value, "input")
    return _INPUTS[fields.choice("kind", tuple(_INPUTS), "tensor")](fields)


def _output(value: Any) -> OutputSpec:
    fields = _Fields(value, "output")
    return _OUTPUTS[fields.choice("kind", tuple(_OUTPUTS), "tensor")](fields)


def _bytes(fields: _Fields) -> BytesSpec:
    fields.finish()
    return BytesSpec()


def _json(fields: _Fields) -> JsonSpec:
    fields.finish()
    return JsonSpec()


def _image(fields: _Fields) -> ImageSpec:
    width, height = fields.whole("width", 1, _LONGEST_SIDE), fields.whole("height", 1, _LONGEST_SIDE)
    channels = fields.take("channels")
    if type(channels) is not int or channels not in (1, 3):
        raise fields.fail("channels", channels, "1 (grey) or 3 (red, green, blue)")
    resize = fields.whole("resize", 0, _LONGEST_SIDE, default=0)
    if 0 < resize < max(width, height):
        raise fields.fail("resize", resize, f"{max(width, height)} at least, or 0 to scale the whole image")
    spec = ImageSpec(
        width=width,
        height=height,
        channels=channels,
        mean=_by_channel(fields, "mean", channels, 0.0),
        # Not 0, by which values are divided.
        std=_by_channel(fields, "std", channels, 1e-6),
        resize=resize,
        max_pixels=fields.whole("max_pixels", width * height, MOST_PIXELS, default=DEFAULT_MAX_PIXELS),
    )
    fields.finish()
    return spec


def _by_channel(fields: _Fields, key: str, channels: int, low: float) -> tuple[float, ...]:
    numbers = fields.take(key)
    if (
        not isinstance(numbers, list)
        or len(numbers) != channels
        or not all(type(number) in (int, float) and low <= number <= 1 for number in numbers)
    ):
        raise fields.fail(key, numbers, f"a list with a number from {low} to 1 for each of {channels} channels")
    return tuple(map(float, numbers))


def _classes(fields: _Fields) -> ClassesSpec:
    labels = fields.take("labels")
    if not isinstance(labels, list) or not labels or not all(isinstance(label, str) and label for label in labels):
        raise fields.fail("labels", labels, "a list of names, in quotes where they look like numbers")
    if len(set(labels)) < len(labels):
        raise fields.fail("labels", labels, "a list of different names")
    spec = ClassesSpec(
        labels=tuple(labels),
        top=fields.whole("top", 1, len(labels), default=min(5, len(labels))),
        activation=fields.choice("activation", ("softmax", "none"), "softmax"),
    )
    fields.finish()
    return spec


def _tensor(fields: _Fields) -> TensorSpec:
    shape, dtype = fields.take("shape"), fields.take("dtype")
    if not isinstance(shape, list) or not all(type(size) is int and size > 0 for size in shape):
        raise fields.fail("shape", shape, "a list of positive whole numbers, the shape of one row")
    if dtype not in DTYPES:
        raise fields.fail("dtype", dtype, f"one of {', '.join(DTYPES)}")
    features = fields.take("features", [])
    if not isinstance(features, list) or not all(isinstance(name, str) for name in features):
        raise fields.fail("features", features, "a list of names")
    if features and len(features) != (wanted := shape[-1] if shape else 0):
        raise fields.fail("features", features, f"{wanted} names, as many as the last dimension of the shape")
    fields.finish()
    return TensorSpec(tuple(shape), dtype, tuple(features))


_INPUTS: dict[str, Callable[[_Fields], InputSpec]] = {"tensor": _tensor, "image": _image, "bytes": _bytes}
_OUTPUTS: dict[str, Callable[[_Fields], OutputSpec]] = {"tensor": _tensor, "classes": _classes, "json": _json}


def _metrics(value: Any) -> dict[str, float]:
    fields = _Fields(value, "metrics")
    metrics = {}
    for key in value:
        number = fields.take(key)
        if not isinstance(key, str) or not _METRIC.fullmatch(key):
            raise _Problem(f"{MANIFEST}: metrics.{key} must have a name that matches ^{_METRIC.pattern}$")
        if type(number) not in (int, float) or not abs(number) <= sys.float_info.max:
            raise fields.fail(key, number, "a finite number")
        metrics[key] = float(number)
    return metrics


def _examples(data: bytes) -> tuple[Example, ...]:
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _Problem(f"{EXAMPLES} is not JSON: {error}") from None
    listed = document.get("examples") if isinstance(document, dict) else None
    if not isinstance(listed, list) or not listed:
        raise _Problem(f'{EXAMPLES} must be an object with a list "examples" of at least one example')
    examples = []
    for index, item in enumerate(listed):
        if not isinstance(item, dict) or item.keys() != {"request", "response", "tolerance"}:
            raise _Problem(f'{EXAMPLES}: example {index} must have exactly "request", "response" and "tolerance"')
        tolerance = item["tolerance"]
        if type(tolerance) not in (int, float) or not 0 <= tolerance <= sys.float_info.max:
            raise _Problem(f"{EXAMPLES}: example {index} has the tolerance {tolerance!r}; it must be a number from 0")
        examples.append(Example(item["request"], item["response"], float(tolerance)))
    return tuple(examples)
