"""Loading models: code, weights, warm-up, self-test."""

import contextlib
import gc
import json
import os
import time
import warnings
from collections.abc import Callable
from typing import Any

# Set before the import: the numbers of threads that the environment asks for have been read by then.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

import torch  # noqa: E402

from model_server import modules, payload, speed  # noqa: E402
from model_server.bundle import EXAMPLES, Bundle, BundleError, Example, passing  # noqa: E402
from model_server.core import Models  # noqa: E402
from model_server.errors import ModelFailed  # noqa: E402
from model_server.memory import keep_batch_memory, release_library_pages  # noqa: E402
from model_server.model import Model  # noqa: E402

# Before anything touches weights: a fork after a parallel region of OpenMP hangs in the child for ever.
torch.set_num_threads(1)

# Rows of the examples that are compared in a batch, and what rounding may change there: a part of each number, and of
# the largest in its row, since a small one may be what large ones left of each other (measured: up to 6e-7 beyond the
# first, in a network of 20 layers). Large ones that stay as they are, such as a mask's -1e9, weren't rounded.
_COMPARED_ROWS = 16
_ROUNDING = 1e-3
_CANCELLATION = 1e-6


def load(bundle: Bundle) -> Models:
    """Load, warm up and self-test the models, ready to be shared with forked workers.

    Raises BundleError; OSError or MemoryError where the machine is at fault and another try may succeed.
    """
    keep_batch_memory()
    threads_before = _threads()
    models = []
    for part in bundle.models:
        models.append(_explained(part, _load))
        if (threads := torch.get_num_threads()) != 1:
            raise BundleError(
                f"{part.label}: the model's code sets PyTorch's threads to {threads}; it must leave them at 1"
            )
        if _threads() > threads_before:
            raise BundleError(f"{part.label}: the model's code starts threads; they would be missing in the workers")
    if len(models) > 1:
        modules.forget_imports()
        for model in models:
            _check_without_imports(model)
    # What is alive now stays: moved out of the collector's sight, its pages stay shared after the fork.
    gc.collect()
    gc.freeze()
    release_library_pages()
    return Models(models)


def load_draft(bundle: Bundle) -> Model:
    """The model of a bundle that has no examples yet, as it is without ``speed``. Raises BundleError."""
    return _explained(bundle, _original)


def probe(models: Models) -> None:
    """Predict each model's first example; whether this process can predict at all. Raises ModelFailed, NotFinite."""
    if torch.get_num_threads() != 1:
        raise ModelFailed("PyTorch is set to more than one thread, which hangs in a forked process")
    for model in models.all:
        rows = _example_rows(model.bundle)[0]
        model.predict([model.prepare(rows.values)])


def to_device(models: Models) -> None:
    """Move the models that may use a GPU there, if there is one. To be called in a worker: CUDA survives no fork.

    Each worker then has its own copy of the weights in the GPU's memory, and the examples aren't compared again there,
    but ``probe`` runs one.
    """
    for model in models.all:
        if model.bundle.device == "auto" and torch.cuda.is_available():
            model.to_device("cuda")


def answer(model: Model, rows: payload.Rows) -> Any:
    """What ``POST /predict`` answers. Raises ModelFailed, BadRequest, UnusableOutput."""
    [output] = model.predict([model.prepare(rows.values)])
    return json.loads(payload.render(output, rows.single))


def parse_request(bundle: Bundle, request: Any) -> payload.Rows:
    """The rows of a body of ``POST /predict``. Raises BadRequest."""
    return payload.parse(json.dumps(request).encode(), bundle.input, bundle.max_rows)


def _explained(bundle: Bundle, loading: Callable[[Bundle], Model]) -> Model:
    modules.make_importable(bundle.directory)
    try:
        return loading(bundle)
    # Of the model's own code too, which may call sys.exit.
    except (Exception, SystemExit) as error:
        # By now it may have been put as the bundle's fault, which would keep the colour down for good.
        if (lack := passing(error)) is not None:
            raise lack from None
        if isinstance(error, BundleError):
            raise
        raise BundleError(f"{bundle.label}: the model can't be loaded: {modules.summary(error)}") from error


def _load(bundle: Bundle) -> Model:
    model = _original(bundle)
    requests = _example_rows(bundle)
    if bundle.speed.options:
        model = _faster(model, requests)
    _warm_up(model, requests)
    _self_test(model, requests)
    _test_together(model, requests)
    return model


def _original(bundle: Bundle) -> Model:
    model = Model(modules.build(bundle), bundle)
    if bundle.input.kind == "bytes" and not hasattr(model.module, "preprocess"):
        raise BundleError(f"{bundle.label}: input.kind is 'bytes', so the model's class must have a preprocess")
    return model


def _faster(model: Model, requests: list[payload.Rows]) -> Model:
    bundle = model.bundle
    try:
        batches = [model.batch([model.prepare(rows.values)]) for rows in requests]
    except Exception as error:
        raise BundleError(f"{bundle.label}: {EXAMPLES}: preparing the examples: {modules.summary(error)}") from error
    full = None
    # Rows that don't go together are tried one by one when they are served.
    with contextlib.suppress(Exception):
        # Those of one request go together even where requests don't.
        rows, count = _compared(requests, max(model.max_batch_rows, min(bundle.max_rows, _COMPARED_ROWS)))
        full = model.batch([model.prepare([row] * count) for row, _ in rows])
    return Model(speed.faster(model.module, bundle, batches, full), bundle)


def _threads() -> int:
    """Threads of this process, those of libraries included, which Python doesn't know of."""
    return len(os.listdir("/proc/self/task"))


def _check_without_imports(model: Model) -> None:
    """Whether the model predicts without finding its own files, as several may have files of the same name."""
    try:
        probe(Models([model]))
    except ModelFailed as error:
        raise BundleError(
            f"{model.bundle.label}: {error}; where a bundle has several models, their files must be imported at the "
            "top of the file that needs them"
        ) from error


def _example_rows(bundle: Bundle) -> list[payload.Rows]:
    requests = []
    for index, example in enumerate(bundle.examples):
        try:
            requests.append(parse_request(bundle, example.request))
        except payload.BadRequest as error:
            raise BundleError(f"{bundle.label}: {EXAMPLES}: the request of example {index}: {error}") from error
    return requests


def _warm_up(model: Model, requests: list[payload.Rows]) -> None:
    row = requests[0].values[0]
    try:
        for rows in (1, 1, model.max_batch_rows, model.max_batch_rows):
            prepared = model.prepare([row] * rows)
            started = time.perf_counter()
            model.predict([prepared])
            # The last one counts: the ones before still allocate and choose kernels.
            model.batch_seconds = time.perf_counter() - started
    except (ModelFailed, payload.BadRequest, payload.NotFinite) as error:
        raise BundleError(f"{model.bundle.label}: warming up with {rows} rows: {modules.summary(error)}") from error


def _self_test(model: Model, requests: list[payload.Rows]) -> None:
    bundle = model.bundle
    for index, (rows, example) in enumerate(zip(requests, bundle.examples, strict=True)):
        try:
            got = answer(model, rows)
        except (ModelFailed, payload.BadRequest, payload.UnusableOutput) as error:
            raise BundleError(f"{bundle.label}: {EXAMPLES}: example {index}: {error}") from error
        if not payload.same(example.response, got, example.tolerance):
            raise BundleError(_mismatch(bundle, index, example, got))


def _compared(requests: list[payload.Rows], most: int) -> tuple[list[tuple[Any, int]], int]:
    """Rows of the examples, each with its example's number, and how often each fits into a batch of ``most`` rows."""
    rows = [(row, index) for index, request in enumerate(requests) for row in request.values]
    rows = rows[: min(most, _COMPARED_ROWS)]
    return rows, most // len(rows)


def _test_together(model: Model, requests: list[payload.Rows]) -> None:
    """Whether rows get in a batch what they get alone, since nobody chooses whom a request is run with."""
    bundle = model.bundle
    if model.max_batch_rows == 1:
        return
    rows, count = _compared(requests, model.max_batch_rows)
    # A classifier's classes may change places for next to nothing; its scores don't.
    wants_tensor = bundle.output.kind != "json"

    def alone(row: Any) -> Any:
        return model.predict([model.prepare([row])], wants_tensor)[0]

    # Rows that don't go together are tried one by one when they are served.
    with contextlib.suppress(ModelFailed, payload.BadRequest, payload.NotFinite):
        together = model.predict([model.prepare([row] * count) for row, _ in rows], wants_tensor)
        for (row, index), wanted, got in zip(rows, [alone(row) for row, _ in rows], together, strict=True):
            # Either may be as far from the recorded answer as the example allows, and from the original as the variant
            # may.
            tolerance = 2 * (bundle.examples[index].tolerance + bundle.speed.tolerance * bool(bundle.speed.options))
            # What isn't answered alike even alone owes that to no neighbour.
            if not _agree(wanted, got, tolerance) and _agree(wanted, alone(row), tolerance):
                raise BundleError(
                    f"{bundle.label}: {EXAMPLES}: a row of example {index} isn't answered in a batch of "
                    f"{count * len(rows)} rows as it is alone: the model's answers depend on their neighbours in a "
                    "batch, and only batching: {max_batch_rows: 1} in the manifest keeps requests apart"
                )


def _agree(alone: Any, together: Any, tolerance: float) -> bool:
    """Whether every row of ``together`` is the only one of ``alone``, which are tensors or lists of JSON values."""
    if isinstance(alone, torch.Tensor):
        wanted, got = alone.expand_as(together).double(), together.double()
        # Equal infinities have no difference, and a NaN agrees with nothing.
        difference = torch.where(wanted == got, 0.0, (wanted - got).abs())
        if not alone.is_floating_point():
            return bool((difference <= tolerance).all())
        sizes = wanted.abs().nan_to_num(nan=0.0, posinf=0.0)
        largest = torch.where(difference > 0, sizes, 0.0).max()
        return bool((difference <= tolerance + _ROUNDING * sizes + _CANCELLATION * largest).all())
    [wanted], values = (json.loads(payload.to_json(rows)) for rows in (alone, together))
    return all(
        payload.same(wanted, value, tolerance + _CANCELLATION * _largest(wanted, value), _ROUNDING) for value in values
    )


def _largest(wanted: Any, got: Any) -> float:
    """The largest of the numbers in ``wanted`` that may be rounded and aren't the same in ``got``, both JSON values."""
    if isinstance(wanted, list) and isinstance(got, list):
        return max(map(_largest, wanted, got), default=0.0)
    if isinstance(wanted, dict) and isinstance(got, dict):
        return max((_largest(value, got.get(key)) for key, value in wanted.items()), default=0.0)
    return abs(wanted) if isinstance(wanted, float) and wanted != got else 0.0


def _mismatch(bundle: Bundle, index: int, example: Example, answer: Any) -> str:
    expected, got = (payload.shortened(json.dumps(value)) for value in (example.response, answer))
    return (
        f"{bundle.label}: {EXAMPLES}: example {index} doesn't reproduce: "
        f"expected {expected} within {example.tolerance}, got {got}"
    )
