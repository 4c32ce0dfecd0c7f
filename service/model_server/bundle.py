"""Reading and verifying a bundle, up to the point where PyTorch is needed."""

import hashlib
import json
import os
import re
import stat
import sys
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from model_server.payload import DTYPES, TensorSpec

MANIFEST = "manifest.yaml"
EXAMPLES = "examples.json"
CHECKSUMS = "SHA256SUMS"

_NAME = re.compile(r"[a-z][a-z0-9-]{0,62}")
_VERSION = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+-]{0,62}")
_METRIC = re.compile(r"[a-z][a-z0-9_]{0,62}")
_LONGEST_MESSAGE = 2000
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
class Bundle:
    """A verified bundle. ``digest`` is ``sha256:<hex>`` of the file SHA256SUMS."""

    directory: Path
    digest: str
    name: str
    version: str
    description: str
    entry_file: str
    entry_class: str
    entry_arguments: dict[str, Any]
    weights: str
    input: TensorSpec
    output: TensorSpec
    max_rows: int
    metrics: dict[str, float]
    examples: tuple[Example, ...]

    @property
    def label(self) -> str:
        """For messages: ``bundle simplemodel 1.0.0``."""
        return f"bundle {self.name} {self.version}"


def read(directory: Path) -> Bundle:
    """Read the bundle in ``directory`` and verify everything that needs no PyTorch. Raises BundleError."""
    if not directory.is_dir():
        raise BundleError(f"bundle: {directory} is not a directory")
    label = "bundle"
    try:
        manifest_bytes = _read_file(directory, MANIFEST)
        # Who is being complained about belongs into every message, also into one about a checksum.
        label = _label(manifest_bytes)
        digest = _verify_checksums(directory)
        return _parse(directory, digest, manifest_bytes, _read_file(directory, EXAMPLES))
    except _Problem as problem:
        raise BundleError(f"{label}: {problem}"[:_LONGEST_MESSAGE]) from None
    except OSError as error:
        raise BundleError(f"{label}: {error.filename or 'a file'} can't be read: {error.strerror}") from None
    # Whatever else a file can hold that trips the code above: the bundle is at fault, and another start won't help.
    except Exception as error:
        summary = " ".join(f"{type(error).__name__}: {error}".split())
        raise BundleError(f"{label}: can't be read: {summary}"[:_LONGEST_MESSAGE]) from error


class _Problem(Exception):
    """What is wrong with a bundle, without its name."""


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
    for folder, subfolders, names in os.walk(directory):
        for name in (*subfolders, *names):
            path = Path(folder, name)
            relative = path.relative_to(directory).as_posix()
            mode = path.lstat().st_mode
            if stat.S_ISREG(mode):
                found.add(relative)
            elif not stat.S_ISDIR(mode):
                raise _Problem(f"{relative} is a link or a special file; a bundle holds ordinary files only")
    return found


def _inner_path(text: str, where: str) -> str:
    path = PurePosixPath(text)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\\" in text or "\0" in text:
        raise _Problem(f"{where}: {text!r} is not a path inside the bundle")
    return path.as_posix()


def _parse(directory: Path, digest: str, manifest: bytes, examples: bytes) -> Bundle:
    try:
        document = yaml.safe_load(manifest)
    except Exception as error:
        raise _Problem(f"{MANIFEST} is not YAML: {' '.join(str(error).split())}") from None
    top = _Fields(document, "")
    entry = _Fields(top.take("entry"), "entry")
    batching = _Fields(top.take("batching"), "batching")
    bundle = Bundle(
        directory=directory,
        digest=digest,
        name=top.text("name", _NAME),
        version=top.text("version", _VERSION),
        description=top.text("description"),
        entry_file=entry.file("file", directory),
        entry_class=entry.text("class"),
        entry_arguments=_arguments(entry.take("arguments", {})),
        weights=top.file("weights", directory),
        input=_tensor(top.take("input"), "input"),
        output=_tensor(top.take("output"), "output"),
        max_rows=batching.whole("max_rows", 1, 65536),
        metrics=_metrics(top.take("metrics", {})),
        examples=_examples(examples),
    )
    for fields in (top, entry, batching):
        fields.finish()
    if not bundle.entry_class.isidentifier():
        raise _Problem(f"{MANIFEST}: entry.class is {bundle.entry_class!r}; it must be the name of a class")
    return bundle


class _Fields:
    """One mapping of the manifest, taken apart field by field; ``finish`` complains about what is left."""

    def __init__(self, document: Any, where: str) -> None:
        if not isinstance(document, dict):
            raise _Problem(f"{MANIFEST}: {where or 'the document'} must be a mapping")
        self._left = dict(document)
        self._where = where

    def _path(self, key: Any) -> str:
        return f"{self._where}.{key}" if self._where else str(key)

    def fail(self, key: str, value: Any, wanted: str) -> _Problem:
        return _Problem(f"{MANIFEST}: {self._path(key)} is {value!r}; it must be {wanted}")

    def take(self, key: str, default: Any = None) -> Any:
        value = self._left.pop(key, default)
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

    def whole(self, key: str, low: int, high: int) -> int:
        value = self.take(key)
        if type(value) is not int or not low <= value <= high:
            raise self.fail(key, value, f"a whole number from {low} to {high}")
        return value

    def file(self, key: str, directory: Path) -> str:
        name = _inner_path(self.text(key), f"{MANIFEST}: {self._path(key)}")
        if not (directory / name).is_file():
            raise self.fail(key, name, "a file of the bundle")
        return name

    def finish(self) -> None:
        for key in self._left:
            raise _Problem(f"{MANIFEST}: {self._path(key)} is not a known field")


def _arguments(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise _Problem(f"{MANIFEST}: entry.arguments must be a mapping of argument names to values")
    return value


def _tensor(value: Any, where: str) -> TensorSpec:
    fields = _Fields(value, where)
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
    return TensorSpec(tuple(shape), dtype)


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
