"""Writing bundles: manifest, examples recorded from the model itself, checksums."""

import base64
import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from model_server import loading, modules, payload, reference, training_rows
from model_server.bundle import CHECKSUMS, EXAMPLES, MANIFEST, Bundle, BundleError, read, read_draft
from model_server.core import Models
from model_server.errors import ModelFailed
from model_server.model import Model


@contextlib.contextmanager
def new_directory(target: Path) -> Iterator[Path]:
    """A directory to fill, which becomes ``target`` when all went well and vanishes otherwise. Raises BundleError."""
    if target.exists() or target.is_symlink():
        raise BundleError(f"{target} exists already; choose another directory, or a new version")
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}-"))
    try:
        yield draft
        draft.chmod(0o755)
        draft.rename(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def complete(directory: Path, fields: dict[str, Any], bodies: Sequence[bytes], tolerance: float) -> Models:
    """Make the code and weights in ``directory`` a whole bundle, and load it as the service does. Raises BundleError.

    ``fields`` are the manifest's; an ``output`` that is missing is found out by running the model. Without ``bodies``
    of example requests, one is made of zeros.
    """
    if "output" not in fields:
        fields = fields | {"output": output_of(directory, fields, bodies)}
    _write_manifest(directory, fields)
    model, requests = _loaded(directory, bodies)
    _write_examples(directory, [_example(model, request, tolerance) for request in requests])
    write_sums(directory)
    return loading.load(read(directory))


def output_of(directory: Path, fields: dict[str, Any], bodies: Sequence[bytes]) -> dict[str, Any]:
    """What the model returns, as the manifest's ``output``, found out by running it. Raises BundleError."""
    # This promises nothing, so that any model keeps it.
    _write_manifest(directory, fields | {"output": {"kind": "json"}})
    model, requests = _loaded(directory, bodies[:1])
    label = model.bundle.label
    if hasattr(model.module, "postprocess"):
        return {"kind": "json"}
    output = _run(model, requests[0])
    if not isinstance(output, torch.Tensor) or output.dim() == 0:
        raise BundleError(
            f"{label}: the model must return a tensor with a row for each row, or have a postprocess; "
            f"it returned {type(output).__name__}"
        )
    dtype = str(output.dtype).removeprefix("torch.")
    if dtype not in payload.DTYPES:
        raise BundleError(f"{label}: the model returns {dtype}; convert it to one of {', '.join(payload.DTYPES)}")
    return {"shape": list(output.shape[1:]), "dtype": dtype}


def record(directory: Path, body: bytes, tolerance: float) -> dict[str, Any]:
    """Add an example to a bundle: a request with the answer that the model gives now. Raises BundleError."""
    bundle = read_draft(directory)
    if bundle.parts:
        raise BundleError(f"{bundle.label} holds several models; record in the directory of one of them")
    model = loading.load_draft(bundle)
    example = _example(model, request_of(bundle, body), tolerance)
    examples = []
    with contextlib.suppress(FileNotFoundError):
        try:
            examples = json.loads((directory / EXAMPLES).read_bytes())["examples"]
        except (ValueError, KeyError, TypeError) as error:
            raise BundleError(f"{bundle.label}: {EXAMPLES} can't be added to: {modules.summary(error)}") from None
    _write_examples(directory, [*examples, example])
    write_sums(directory)
    return example


def write_reference(directory: Path, rows: Path) -> str:
    """Write ``reference.json`` from a file of training rows, and name it in the manifest; what it is of.

    Raises BundleError.
    """
    bundle = read_draft(directory)
    if bundle.parts:
        raise BundleError(f"{bundle.label} holds several models; give the directory of one of them")
    spec = bundle.input
    if spec.kind != "tensor" or len(spec.shape) != 1:
        raise BundleError(f"{bundle.label}: a reference is for inputs that are one list of numbers a row")
    try:
        columns = training_rows.read(rows, spec.features, spec.shape[0], spec.dtype)
        document = reference.measure(columns)
        text = reference.to_text(document)
        reference.parse(text.encode())
    except ValueError as error:
        raise BundleError(f"{rows.name}: {error}") from None
    manifest = (directory / MANIFEST).read_text()
    named = yaml.safe_load(manifest).get("reference")
    _replace(directory / (named or reference.FILE), text)
    if named is None:
        _replace(directory / MANIFEST, f"{manifest.rstrip()}\nreference: {reference.FILE}\n")
    write_sums(directory)
    return f"{named or reference.FILE}: {document['count']} rows of {', '.join(columns)}"


def request_of(bundle: Bundle, body: bytes) -> Any:
    """The body of ``POST /predict`` that a file stands for.

    That is the file's JSON, or, for models that take bytes, and for those that take images and a file that is no JSON,
    a request with the file itself as its only row. Raises BundleError.
    """
    if bundle.input.kind != "bytes":
        try:
            return json.loads(body)
        except ValueError:
            if bundle.input.kind != "image":
                raise BundleError(f'{bundle.label}: the example request isn\'t JSON; write {{"data": …}}') from None
    return {"data": base64.b64encode(body).decode()}


def write_sums(directory: Path) -> int:
    """Write SHA256SUMS; how many files it lists. In a bundle of several models, also each model's own."""
    listed = _listed_models(directory)
    for part in directory.iterdir():
        if part.is_dir() and part.name in listed:
            write_sums(part)
    files = sorted(path for path in directory.rglob("*") if not path.is_dir() and path != directory / CHECKSUMS)
    lines = []
    for path in files:
        with open(path, "rb") as file:
            lines.append(
                f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.relative_to(directory).as_posix()}\n"
            )
    _replace(directory / CHECKSUMS, "".join(lines))
    return len(lines)


def _listed_models(directory: Path) -> list[Any]:
    """What the manifest lists as models. Whether that is right is for ``check`` to say."""
    try:
        manifest = yaml.safe_load((directory / MANIFEST).read_bytes())
    # ValueError: a date that doesn't exist, or bytes that are no text.
    except (FileNotFoundError, yaml.YAMLError, ValueError, RecursionError):
        return []
    listed = manifest.get("models") if isinstance(manifest, dict) else None
    return listed if isinstance(listed, list) else []


def only_class(path: Path, name: str | None) -> str:
    """The class of the model in a Python file: ``name``, or the only one there is. Raises BundleError."""
    modules.make_importable(path.parent)
    try:
        classes = sorted(modules.module_classes(modules.run_file(path, "draft")))
    except ImportError as error:
        raise BundleError(str(error)) from error
    if name is None and len(classes) == 1:
        return classes[0]
    if name in classes:
        return name
    has = f"it has {', '.join(classes)}" if classes else "it has none"
    wanted = f"no class {name} that is a torch.nn.Module" if name else "not one class that is a torch.nn.Module"
    raise BundleError(f"{path.name} has {wanted}; {has}" + ("; choose with --class" if len(classes) > 1 else ""))


def _loaded(directory: Path, bodies: Sequence[bytes]) -> tuple[Model, list[Any]]:
    bundle = read_draft(directory)
    if not bodies and bundle.input.kind != "tensor":
        raise BundleError(f"{bundle.label}: a request is needed as an example; give its body with --example FILE")
    requests = [request_of(bundle, body) for body in bodies]
    if not requests:
        zeros = torch.zeros(bundle.input.shape, dtype=getattr(torch, bundle.input.dtype))
        requests = [{"data": zeros.tolist()}]
    return loading.load_draft(bundle), requests


def _run(model: Model, request: Any) -> Any:
    try:
        rows = loading.parse_request(model.bundle, request)
        with torch.inference_mode():
            return model.module(model.batch([model.prepare(rows.values)]))
    except payload.BadRequest as error:
        raise BundleError(f"{model.bundle.label}: the example request: {error}") from error
    except (Exception, SystemExit) as error:
        raise BundleError(f"{model.bundle.label}: running the example: {modules.summary(error)}") from error


def _example(model: Model, request: Any, tolerance: float) -> dict[str, Any]:
    label = model.bundle.label
    try:
        response = loading.answer(model, loading.parse_request(model.bundle, request))
    except payload.BadRequest as error:
        raise BundleError(f"{label}: the example request: {error}") from error
    except (ModelFailed, payload.UnusableOutput) as error:
        raise BundleError(f"{label}: running the example: {error}") from error
    return {"request": request, "response": response, "tolerance": tolerance}


def _write_manifest(directory: Path, fields: dict[str, Any]) -> None:
    text = yaml.safe_dump(fields, sort_keys=False, default_flow_style=None, allow_unicode=True, width=110)
    _replace(directory / MANIFEST, text)


def _write_examples(directory: Path, examples: list[dict[str, Any]]) -> None:
    _replace(directory / EXAMPLES, json.dumps({"examples": examples}, indent=1) + "\n")


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(text)
    os.replace(temporary, path)
