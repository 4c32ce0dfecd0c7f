"""The model itself: the only module that imports PyTorch."""

import gc
import json
import os
import sys
import types
import warnings
from typing import Any

# Set before the import: the numbers of threads that the environment asks for have been read by then, but PyTorch
# warns about a missing NumPy, which nothing here needs.
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")

import torch  # noqa: E402

from model_server import payload  # noqa: E402
from model_server.bundle import EXAMPLES, Bundle, BundleError, Example  # noqa: E402

# Before anything touches weights: a fork after a parallel region of OpenMP hangs in the child for ever.
torch.set_num_threads(1)

_MODULE_NAME = "bundle_model"


class ModelFailed(Exception):
    """The model's own code failed on a request that fits its specification."""


class Model:
    """A loaded model in evaluation mode. Not to be called by two threads at once."""

    def __init__(self, module: torch.nn.Module, bundle: Bundle) -> None:
        self._module = module
        self._input = bundle.input
        self._output = bundle.output
        self._input_dtype = getattr(torch, bundle.input.dtype)
        self._output_dtype = getattr(torch, bundle.output.dtype)
        self._preprocess = getattr(module, "preprocess", self._to_tensor)
        self._postprocess = getattr(module, "postprocess", self._to_values)
        self._probe = payload.parse(json.dumps(bundle.examples[0].request).encode(), bundle.input, bundle.max_rows)

    def predict(self, rows: list[Any]) -> list[Any]:
        """One JSON value for each of ``rows``, which have passed ``payload.parse``. Raises ModelFailed."""
        try:
            with torch.inference_mode():
                values = self._postprocess(self._module(self._preprocess(rows)))
            if isinstance(values, torch.Tensor):
                values = values.tolist()
            if not isinstance(values, list) or len(values) != len(rows):
                raise TypeError(f"postprocess must return a list with one value for each of {len(rows)} rows")
        except (Exception, SystemExit) as error:
            raise ModelFailed(f"the model failed: {type(error).__name__}: {error}") from error
        return values

    def probe(self) -> None:
        """Predict the first example; whether the process can predict at all. Raises ModelFailed."""
        if torch.get_num_threads() != 1:
            raise ModelFailed("PyTorch is set to more than one thread, which hangs in a forked process")
        self.predict(self._probe.values)

    def _to_tensor(self, rows: list[Any]) -> torch.Tensor:
        return torch.tensor(rows, dtype=self._input_dtype)

    def _to_values(self, output: torch.Tensor) -> list[Any]:
        if output.shape[1:] != self._output.shape or output.dtype != self._output_dtype:
            raise TypeError(
                f"the manifest promises {self._output.describe()} for each row, "
                f"the model returned {output.dtype} of shape {list(output.shape)}"
            )
        # A row with one number is written as that number and not as a list of one.
        return (output.flatten() if self._output.shape == (1,) else output).tolist()


def load(bundle: Bundle) -> Model:
    """Load, warm up and self-test the model, ready to be shared with forked workers. Raises BundleError."""
    try:
        return _load(bundle)
    # Of the model's own code too, which may call sys.exit.
    except (Exception, SystemExit) as error:
        if isinstance(error, BundleError):
            raise
        raise BundleError(f"{bundle.label}: the model can't be loaded: {_summary(error)}") from error


def _load(bundle: Bundle) -> Model:
    threads_before = _threads()
    module = _instantiate(bundle)
    _load_weights(module, bundle)
    module.eval()
    module.requires_grad_(False)
    requests = _example_requests(bundle)
    model = Model(module, bundle)
    _warm_up(model, requests, bundle)
    _self_test(model, requests, bundle)
    if _threads() > threads_before:
        raise BundleError(f"{bundle.label}: {bundle.entry_file} starts threads; they would be missing in the workers")
    # What is alive now stays: moved out of the collector's sight, its pages stay shared after the fork.
    gc.collect()
    gc.freeze()
    return model


def _threads() -> int:
    """Threads of this process, those of libraries included, which Python doesn't know of."""
    return len(os.listdir("/proc/self/task"))


def _instantiate(bundle: Bundle) -> torch.nn.Module:
    path = bundle.directory / bundle.entry_file
    code = types.ModuleType(_MODULE_NAME)
    code.__file__ = str(path)
    sys.modules[_MODULE_NAME] = code
    try:
        # Compiled from the bytes and not imported, which would leave bytecode in the bundle.
        exec(compile(path.read_bytes(), str(path), "exec"), code.__dict__)
    except (Exception, SystemExit) as error:
        raise BundleError(f"{bundle.label}: {bundle.entry_file} can't be imported: {_summary(error)}") from error
    cls = getattr(code, bundle.entry_class, None)
    if not (isinstance(cls, type) and issubclass(cls, torch.nn.Module)):
        raise BundleError(
            f"{bundle.label}: {bundle.entry_file} has no class {bundle.entry_class} that is a torch.nn.Module"
        )
    try:
        return cls(**bundle.entry_arguments)
    except (Exception, SystemExit) as error:
        raise BundleError(
            f"{bundle.label}: {bundle.entry_class} can't be made from entry.arguments: {_summary(error)}"
        ) from error


def _load_weights(module: torch.nn.Module, bundle: Bundle) -> None:
    try:
        # No second try without weights_only: that would run whatever code the file holds.
        state = torch.load(bundle.directory / bundle.weights, map_location="cpu", weights_only=True)
    except Exception as error:
        raise BundleError(f"{bundle.label}: {bundle.weights} can't be loaded: {_summary(error)}") from error
    try:
        module.load_state_dict(state)
    except Exception as error:
        raise BundleError(
            f"{bundle.label}: {bundle.weights} doesn't fit {bundle.entry_class}: {_summary(error)}"
        ) from error


def _example_requests(bundle: Bundle) -> list[payload.Rows]:
    requests = []
    for index, example in enumerate(bundle.examples):
        try:
            body = json.dumps(example.request).encode()
            requests.append(payload.parse(body, bundle.input, bundle.max_rows))
        except payload.BadRequest as error:
            raise BundleError(f"{bundle.label}: {EXAMPLES}: the request of example {index}: {error}") from error
    return requests


def _warm_up(model: Model, requests: list[payload.Rows], bundle: Bundle) -> None:
    row = requests[0].values[0]
    try:
        for rows in (1, 1, bundle.max_rows):
            model.predict([row] * rows)
    except ModelFailed as error:
        raise BundleError(f"{bundle.label}: warming up with {rows} rows: {_summary(error)}") from error


def _self_test(model: Model, requests: list[payload.Rows], bundle: Bundle) -> None:
    for index, (rows, example) in enumerate(zip(requests, bundle.examples, strict=True)):
        try:
            answer = json.loads(payload.render(model.predict(rows.values), rows.single))
        except (ModelFailed, payload.UnusableOutput) as error:
            raise BundleError(f"{bundle.label}: {EXAMPLES}: example {index}: {error}") from error
        if not payload.same(example.response, answer, example.tolerance):
            raise BundleError(_mismatch(bundle, index, example, answer))


def _mismatch(bundle: Bundle, index: int, example: Example, answer: Any) -> str:
    expected, got = (json.dumps(value)[:200] for value in (example.response, answer))
    return (
        f"{bundle.label}: {EXAMPLES}: example {index} doesn't reproduce: "
        f"expected {expected} within {example.tolerance}, got {got}"
    )


def _summary(error: BaseException) -> str:
    """An exception on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
