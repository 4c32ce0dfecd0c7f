"""TorchServe's model archives (.mar), made into bundles."""

import json
import shutil
import stat
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from model_server import authoring, handlers
from model_server.bundle import CHECKSUMS, EXAMPLES, MANIFEST, BundleError
from model_server.core import Models
from model_server.images import IMAGENET

_ARCHIVE_MANIFEST = "MAR-INF/MANIFEST.json"
_MOST_ENTRIES = 10_000
_MOST_BYTES = 16 << 30
_CHUNK_BYTES = 1 << 20
# Handlers that TorchServe has itself and that need packages or models of their own.
_UNSUPPORTED = (
    "text_classifier",
    "object_detector",
    "image_segmenter",
    "dali_image_classifier",
    "vllm_handler",
    "trt_llm_handler",
)
_IMAGENET = {
    "kind": IMAGENET.kind,
    "width": IMAGENET.width,
    "height": IMAGENET.height,
    "channels": IMAGENET.channels,
    "resize": IMAGENET.resize,
    "mean": list(IMAGENET.mean),
    "std": list(IMAGENET.std),
}


@dataclass(frozen=True)
class Archive:
    """What the manifest of an archive says; a file that it doesn't name is None."""

    name: str
    version: str
    handler: str
    model_file: str | None
    serialized_file: str | None
    config_file: str | None
    requirements_file: str | None


@dataclass(frozen=True)
class Choices:
    """What an archive leaves open. ``fields`` replace those of the bundle's manifest."""

    class_name: str | None = None
    arguments: dict[str, Any] | None = None
    handler_class: str | None = None
    fields: dict[str, Any] | None = None


def make_bundle(
    path: Path, directory: Path, choices: Choices, bodies: list[bytes], tolerance: float
) -> tuple[Models, list[str]]:
    """Make the archive a bundle in ``directory``, which is empty; the loaded bundle, and what is to be known about it.

    Raises BundleError.
    """
    archive = unpack(path, directory)
    fields = {
        "name": archive.name,
        "version": archive.version,
        "description": f"Imported from {path.name}.",
    } | _code(archive, directory, choices)
    fields["batching"] = {"max_rows": 64}
    given = choices.fields or {}
    if archive.handler == "image_classifier":
        fields |= {"input": _IMAGENET} | given
        if "output" not in given:
            fields["output"] = _labelled(directory, fields, bodies)
    else:
        fields |= given
    if "input" not in fields:
        raise BundleError(f"{path.name} doesn't say what its model takes; give --input-shape, for example 3,224,224")
    notes = []
    if archive.requirements_file:
        notes.append(
            f"{archive.requirements_file} is ignored: the model container installs nothing. Where the model needs a "
            "package that the container lacks, loading has failed above"
        )
    return authoring.complete(directory, fields, bodies, tolerance), notes


def unpack(path: Path, directory: Path) -> Archive:
    """Unpack an archive's files into ``directory`` and read its manifest. Raises BundleError."""
    try:
        with zipfile.ZipFile(path) as file:
            entries = _checked(path, file.infolist())
            if _ARCHIVE_MANIFEST not in entries:
                raise BundleError(f"{path.name} is no model archive: it has no {_ARCHIVE_MANIFEST}")
            room = _MOST_BYTES
            for name, entry in entries.items():
                target = directory / name
                target.parent.mkdir(parents=True, exist_ok=True)
                room = _copy(path, file, entry, target, room)
    except (zipfile.BadZipFile, IsADirectoryError) as error:
        raise BundleError(
            f"{path.name} isn't a zip file ({error}); make it with torch-model-archiver --archive-format default"
        ) from None
    except BundleError:
        raise
    # zipfile raises nearly anything where an archive is damaged: zlib.error, UnicodeDecodeError, RuntimeError.
    except Exception as error:
        raise BundleError(f"{path} can't be unpacked: {error}") from error
    manifest = (directory / _ARCHIVE_MANIFEST).read_bytes()
    # What it says is in the bundle's own manifest afterwards.
    shutil.rmtree(directory / "MAR-INF")
    return _archive(path, manifest, directory)


def _checked(path: Path, entries: list[zipfile.ZipInfo]) -> dict[str, zipfile.ZipInfo]:
    """The archive's files by name; nothing that could be written anywhere but below one directory."""
    if len(entries) > _MOST_ENTRIES:
        raise BundleError(f"{path.name} has {len(entries)} entries; at most {_MOST_ENTRIES} are unpacked")
    files: dict[str, zipfile.ZipInfo] = {}
    for entry in entries:
        # As it is in the file: zipfile changes names that it finds odd.
        name, pure = entry.orig_filename, PurePosixPath(entry.filename)
        if name != entry.filename or "\\" in name or pure.is_absolute() or ".." in pure.parts or ":" in name:
            raise BundleError(f"{path.name} has an entry {name!r}, which is not a path inside the archive")
        kind = stat.S_IFMT(entry.external_attr >> 16)
        if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
            raise BundleError(f"{path.name}: {name} is a link or a special file; an archive holds ordinary files only")
        if entry.is_dir():
            continue
        if pure.as_posix() in files:
            raise BundleError(f"{path.name} has {name} twice")
        if pure.as_posix() in (MANIFEST, EXAMPLES, CHECKSUMS):
            raise BundleError(f"{path.name} has a file {name}, which a bundle needs for itself; rename it")
        files[pure.as_posix()] = entry
    return files


def _copy(path: Path, file: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path, room: int) -> int:
    """Unpack one file; the bytes left for the others, counted as they come, as the sizes that it states may lie."""
    with file.open(entry) as source, open(target, "xb") as sink:
        while chunk := source.read(_CHUNK_BYTES):
            room -= len(chunk)
            if room < 0:
                raise BundleError(f"{path.name} holds more than {_MOST_BYTES >> 30} GiB")
            sink.write(chunk)
    return room


def _archive(path: Path, manifest: bytes, directory: Path) -> Archive:
    try:
        document = json.loads(manifest)
        model = document["model"]
        runtime = document.get("runtime", "python")
        texts = {key: model.get(key) for key in ("modelFile", "serializedFile", "configFile", "requirementsFile")}
        name, version, handler = model["modelName"], model["modelVersion"], model["handler"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BundleError(f"{path.name}: {_ARCHIVE_MANIFEST} can't be used: {type(error).__name__}: {error}") from None
    if not str(runtime).startswith("python"):
        raise BundleError(f"{path.name} is for the runtime {runtime}; only Python is supported")
    for key, value in texts.items():
        if value and (not isinstance(value, str) or value != Path(value).name or not (directory / value).is_file()):
            raise BundleError(f"{path.name}: {_ARCHIVE_MANIFEST}: {key} is {value!r}, which is not in the archive")
    return Archive(
        name=str(name),
        version=str(version),
        handler=str(handler),
        model_file=texts["modelFile"] or None,
        serialized_file=texts["serializedFile"] or None,
        config_file=texts["configFile"] or None,
        requirements_file=texts["requirementsFile"] or None,
    )


def _code(archive: Archive, directory: Path, choices: Choices) -> dict[str, Any]:
    """The fields of the bundle's manifest that say what runs."""
    fields: dict[str, Any] = {}
    if archive.handler in _UNSUPPORTED:
        raise BundleError(
            f"TorchServe's own handler {archive.handler} isn't supported; archive the model again with a handler file"
        )
    builtin = archive.handler in ("base_handler", "image_classifier")
    if not builtin:
        fields["handler"] = _handler(archive, directory, choices)
        fields |= {"input": {"kind": "bytes"}, "output": {"kind": "json"}}
    if archive.model_file:
        name = authoring.only_class(directory / archive.model_file, choices.class_name)
        fields["entry"] = {"file": archive.model_file, "class": name, "arguments": choices.arguments or {}}
    if archive.serialized_file:
        fields["weights"] = archive.serialized_file
        if builtin and not archive.model_file:
            fields["weights_format"] = "torchscript"
        elif builtin:
            safe = archive.serialized_file.endswith(".safetensors")
            fields["weights_format"] = "safetensors" if safe else "state_dict"
    elif builtin and not archive.model_file:
        raise BundleError("the archive has neither a model file nor a serialized file, so there is nothing to run")
    return fields


def _handler(archive: Archive, directory: Path, choices: Choices) -> dict[str, Any]:
    file, _, function = archive.handler.partition(":")
    file = file if file.endswith(".py") else f"{file}.py"
    if file != Path(file).name or not (directory / file).is_file():
        raise BundleError(
            f"the handler {archive.handler!r} is neither one of TorchServe's own nor a file in the archive"
        )
    if function not in ("", "handle"):
        raise BundleError(f"the handler's function is {function!r}; only handle is supported, rename it")
    named = {"file": file, "class": choices.handler_class, "config": archive.config_file}
    return {key: value for key, value in named.items() if value}


def _labelled(directory: Path, fields: dict[str, Any], bodies: list[bytes]) -> dict[str, Any]:
    """The output of an image classifier, with the labels of index_to_name.json, as many as the model has classes."""
    # Imported by path, from where handlers find it.
    handlers.offer_torchserve()
    from ts.utils.util import load_label_mapping

    try:
        mapping = load_label_mapping(str(directory / "index_to_name.json")) or {}
    except ValueError as error:
        raise BundleError(f"index_to_name.json: {error}") from None
    shape = authoring.output_of(directory, fields, bodies)["shape"]
    if len(shape) != 1:
        raise BundleError(f"an image classifier returns one score for each class, not the shape {shape}")
    names = [mapping.get(str(number), str(number)) for number in range(shape[0])]
    # ImageNet has two cranes.
    labels = [name if names.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(names)]
    return {"kind": "classes", "labels": labels}
