"""``python -m model_server.bundle_tool``: make, import and check bundles with the code that the host runs.

Exit status 0 when all is well, 1 when a bundle can't be made or served, 2 for wrong usage.
"""

import argparse
import os
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from model_server.bundle import WEIGHTS_FORMATS, BundleError, read

_EXAMPLES = """\
bundle_tool is short for PYTHONPATH=service .venv/bin/python -m model_server.bundle_tool, or make bundle ARGS="…".

examples:
  from your own model.py and weights, with the output found out by running the model:
    bundle_tool init bundles/churn/1.0.0 --name churn --model model.py --weights weights.pth \\
        --input-shape 2 --example '{"data": [0.2, 0.6]}'
  from TorchScript, which holds its own code:
    bundle_tool init bundles/churn/1.0.0 --name churn --weights model.pt --weights-format torchscript --input-shape 2
  from a TorchServe archive:
    bundle_tool import churn.mar bundles/churn/1.0.0 --example request.json
  what the model was trained on, so that drift is noticed:
    bundle_tool reference bundles/churn/1.0.0 training.csv
  after a change, before a delivery:
    bundle_tool sums bundles/churn/1.0.0
    bundle_tool check bundles/churn/1.0.0

docs/bundles.md describes every field and option.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; the exit status."""
    given = _parser().parse_args(arguments)
    try:
        given.run(given)
    except BundleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror}", file=sys.stderr)
        return 1
    return 0


def _check(given: argparse.Namespace) -> None:
    bundle = read(given.directory)
    print(f"ok  checksums, manifest and examples of {bundle.label}")
    # After the reading, which takes no time, since this imports PyTorch.
    from model_server import loading

    models = loading.load(bundle)
    for model in models.all:
        label = f"{model.name} {model.version}"
        print(f"ok  {label}: loaded; a batch of {model.max_batch_rows} took {model.batch_seconds * 1000:.3g} ms")
        for option in model.bundle.speed.options:
            print(f"ok  {label}: {option}, within {model.bundle.speed.tolerance:g} of the original")
        print(f"ok  {label}: examples: {len(model.bundle.examples)} of {len(model.bundle.examples)} reproduce")
    print(_next(given.directory))


def _sums(given: argparse.Namespace) -> None:
    from model_server import authoring

    print(f"SHA256SUMS lists {authoring.write_sums(given.directory)} files")
    print(f"Next: bundle_tool check {given.directory}")


def _record(given: argparse.Namespace) -> None:
    from model_server import authoring

    _print_example(authoring.record(given.directory, _body(given.request), given.tolerance))
    print("Look whether the answer is right: from now on the model is held to it.")
    print(f"Next: bundle_tool check {given.directory}")


def _reference(given: argparse.Namespace) -> None:
    from model_server import authoring

    print(authoring.write_reference(given.directory, given.rows))
    print(f"Next: bundle_tool check {given.directory}")


def _init(given: argparse.Namespace) -> None:
    from model_server import authoring

    if given.model is None and given.weights is None:
        raise BundleError("there is nothing to run: give --model, --weights or both")
    sources = [path for path in (given.model, given.weights, *given.file) if path is not None]
    with authoring.new_directory(given.directory) as draft:
        for source in sources:
            if (draft / source.name).exists():
                raise BundleError(f"two of the files are called {source.name}; rename one")
            shutil.copyfile(source, draft / source.name)
        fields: dict[str, Any] = {
            "name": given.name,
            "version": "1.0.0",
            "description": f"The model {given.name}.",
        }
        if given.model is not None:
            name = authoring.only_class(draft / given.model.name, given.class_name)
            fields["entry"] = {"file": given.model.name, "class": name, "arguments": given.arguments}
        if given.weights is not None:
            fields["weights"] = given.weights.name
        if given.weights_format is not None:
            fields["weights_format"] = given.weights_format
        fields |= {"batching": {"max_rows": 64}} | _chosen_fields(given)
        if "input" not in fields:
            raise BundleError("what a row looks like isn't known: give --input-shape or --input")
        models = authoring.complete(draft, fields, _bodies(given), given.tolerance)
        _print_made(models)
    print(_next(given.directory))


def _import(given: argparse.Namespace) -> None:
    from model_server import archive, authoring

    choices = archive.Choices(given.class_name, given.arguments, given.handler_class, _chosen_fields(given))
    with authoring.new_directory(given.directory) as draft:
        models, notes = archive.make_bundle(given.archive, draft, choices, _bodies(given), given.tolerance)
        _print_made(models)
    for note in notes:
        print(f"note: {note}")
    print(_next(given.directory))


def _chosen_fields(given: argparse.Namespace) -> dict[str, Any]:
    """The manifest's fields that options have set."""
    fields: dict[str, Any] = {}
    for key in ("name", "version", "description"):
        if getattr(given, key) is not None:
            fields[key] = getattr(given, key)
    if given.input_shape is not None:
        fields["input"] = {"shape": given.input_shape, "dtype": given.input_dtype}
        if given.features:
            fields["input"]["features"] = given.features.split(",")
    elif given.input is not None:
        fields["input"] = given.input
    if given.output is not None:
        fields["output"] = given.output
    if given.max_rows is not None:
        fields["batching"] = {"max_rows": given.max_rows}
    return fields


def _bodies(given: argparse.Namespace) -> list[bytes]:
    return [_body(text) for text in given.example]


def _body(text: str) -> bytes:
    """An example as it was given: JSON itself, ``-`` for standard input, or a file."""
    if text == "-":
        return sys.stdin.buffer.read()
    if text.lstrip().startswith("{"):
        return text.encode()
    return Path(text).read_bytes()


def _print_made(models: Any) -> None:
    bundle = models.default.bundle
    print(f"made {bundle.label}: {bundle.input.describe()} in, {bundle.output.kind} out")
    for example in bundle.examples:
        _print_example({"request": example.request, "response": example.response, "tolerance": example.tolerance})
    print("Look whether the recorded answers are right: from now on the model is held to them.")


def _print_example(example: dict[str, Any]) -> None:
    from model_server.payload import shortened, to_json

    request, response = (to_json(example[key]).decode() for key in ("request", "response"))
    print(f"recorded  {shortened(request)}  ->  {shortened(response)}  within {example['tolerance']:g}")


def _next(directory: Path) -> str:
    return f"Ready to be served. Try it in the repository: PYTHONPATH=service python -m model_server.serve {directory}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="bundle_tool",
        description="Make, import and check bundles: a model with everything that it takes to serve it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        found.set_defaults(run=run)
        return found

    check = command("check", _check, "verify, load, warm up and self-test a bundle, as the host does before it serves")
    check.add_argument("directory", type=Path, help="the bundle")

    sums = command("sums", _sums, "write SHA256SUMS, after a change of any file")
    sums.add_argument("directory", type=Path, help="the bundle")

    record = command("record", _record, "add an example to a bundle: a request with the answer that the model gives")
    record.add_argument("directory", type=Path, help="the bundle")
    record.add_argument(
        "--request", required=True, metavar="JSON|FILE|-", help="body of POST /predict, or an image or bytes as a file"
    )
    _add_tolerance(record)

    reference = command("reference", _reference, "add statistics of the training rows to a bundle, to notice drift by")
    reference.add_argument("directory", type=Path, help="the bundle")
    reference.add_argument("rows", type=Path, metavar="CSV|NPY", help="the training rows, before any preprocessing")

    init = command("init", _init, "make a bundle from a model.py, weights, or both")
    init.add_argument("directory", type=Path, help="where the bundle goes; must not exist yet")
    init.add_argument("--name", required=True, help="letters, digits, hyphens and underscores")
    init.add_argument("--model", type=Path, metavar="FILE", help="Python file with the model's class")
    init.add_argument("--weights", type=Path, metavar="FILE", help="state dict, safetensors or TorchScript")
    init.add_argument(
        "--weights-format",
        choices=WEIGHTS_FORMATS,
        help="by default: .pth and .pt state_dict, .safetensors safetensors",
    )
    init.add_argument(
        "--file", type=Path, action="append", default=[], metavar="FILE", help="another file that the model needs"
    )
    _add_shared(init, arguments={})

    load = command("import", _import, "make a bundle from a TorchServe archive (.mar)")
    load.add_argument("archive", type=Path, metavar="MAR", help="the archive")
    load.add_argument("directory", type=Path, help="where the bundle goes; must not exist yet")
    load.add_argument("--name", help="by default the archive's")
    load.add_argument("--handler-class", metavar="NAME", help="where the handler's file has several")
    _add_shared(load, arguments=None)
    return parser


def _add_shared(parser: argparse.ArgumentParser, arguments: Any) -> None:
    parser.add_argument("--version", help="of the bundle; by default 1.0.0, or the archive's")
    parser.add_argument("--description", help="one sentence")
    parser.add_argument("--class", dest="class_name", metavar="NAME", help="the model's class, if there are several")
    parser.add_argument(
        "--arguments", type=_mapping, default=arguments, metavar="YAML", help="what the class is made with: {hidden: 4}"
    )
    row = parser.add_mutually_exclusive_group()
    row.add_argument("--input-shape", type=_shape, metavar="N,N,…", help="shape of one row, for example 3,224,224")
    row.add_argument("--input", type=_mapping, metavar="YAML", help="instead: the manifest's whole input")
    parser.add_argument("--input-dtype", default="float32", metavar="TYPE", help="type of its numbers (%(default)s)")
    parser.add_argument("--features", metavar="A,B,…", help="names along the last dimension")
    parser.add_argument("--output", type=_mapping, metavar="YAML", help="the manifest's output; by default found out")
    parser.add_argument("--max-rows", type=int, metavar="N", help="rows accepted in one request (64)")
    parser.add_argument(
        "--example",
        action="append",
        default=[],
        metavar="JSON|FILE|-",
        help="request to record the answer of; repeatable; numbers default to zeros",
    )
    _add_tolerance(parser)


def _add_tolerance(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tolerance", type=float, default=1e-4, help="how far numbers may be off later, absolutely (%(default)s)"
    )


def _shape(text: str) -> list[int]:
    if not re.fullmatch(r"(\d+(,\d+)*)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} isn't a list of whole numbers such as 3,224,224")
    return [int(size) for size in text.split(",") if size]


def _mapping(text: str) -> dict[str, Any]:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r} isn't a mapping in YAML such as {{hidden: 4}}")
    return value


if __name__ == "__main__":
    # As in the service: threads of PyTorch's would be counted as the model's.
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    # And what a model imports must be in its bundle, not in the directory that this was started in.
    if not sys.flags.safe_path:
        del sys.path[0]
    sys.exit(main())
