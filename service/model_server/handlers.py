"""TorchServe's handlers, run as modules.

A handler gets what TorchServe gives it: for each row ``{"body": …}``, the body as a bytearray, or, where that is a JSON
object or list, as what it holds (TorchServe decides that by the content type, which a row doesn't have). What it does
with other processes, GPUs, response headers and metrics of its own has no effect here or fails, as said below.
"""

import inspect
import json
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from model_server.bundle import Bundle, BundleError
from model_server.payload import BadRequest

# Holds the package ts, our own, with the base classes and helpers that handlers import from TorchServe.
_TORCHSERVE = str(Path(__file__).with_name("torchserve"))


def offer_torchserve() -> None:
    """Have ``import ts`` find what stands in for TorchServe."""
    if _TORCHSERVE not in sys.path:
        sys.path.append(_TORCHSERVE)


def _prediction_exception() -> type[Exception]:
    """The class that handlers import; not at the top, since ``offer_torchserve`` comes first."""
    from ts.utils.util import PredictionException

    return PredictionException


class HandlerModule(torch.nn.Module):
    """A handler behind the three steps of every model: rows are bodies (bytes), outputs JSON values."""

    def __init__(self, handle: Callable[[list[dict[str, Any]], "Context"], Any], context: "Context") -> None:
        super().__init__()
        self._handle = handle
        self._context = context

    def preprocess(self, rows: Sequence[bytes]) -> list[dict[str, Any]]:
        """The rows as handlers know them."""
        return [{"body": _body(row)} for row in rows]

    def forward(self, data: list[dict[str, Any]]) -> Any:
        """All of the handler's work. Raises BadRequest where it, or its base class, finds the client at fault."""
        try:
            return self._handle(data, self._context.batch(len(data)))
        except Exception as error:
            if isinstance(error, _prediction_exception()) and error.error_code in range(400, 500):
                raise BadRequest(error.message) from error
            raise

    def postprocess(self, output: Any) -> list[Any]:
        """The handler's answers, one for each row."""
        return list(output) if isinstance(output, list | tuple) else output


class Context:
    """What TorchServe tells a handler about the model and the requests."""

    def __init__(self, bundle: Bundle) -> None:
        handler, entry = bundle.handler, bundle.entry
        self.model_name = bundle.name
        self.manifest = {
            "createdOn": "",
            "runtime": "python",
            "archiverVersion": "",
            "model": {
                "modelName": bundle.name,
                "modelVersion": bundle.version,
                "handler": handler.file,
                "modelFile": entry.file if entry else "",
                "serializedFile": bundle.weights or "",
                # Beyond TorchServe, which takes the only class of the file.
                "modelClass": entry.class_name if entry else "",
                "modelArguments": entry.arguments if entry else {},
            },
        }
        self._system_properties = {
            "model_dir": str(bundle.directory),
            "gpu_id": None,
            "batch_size": bundle.max_batch_rows,
            "server_name": "model_server",
            "server_version": "1.0",
            "limit_max_image_pixels": True,
        }
        config = (bundle.directory / handler.config).read_bytes() if handler.config else b"{}"
        self.model_yaml_config = yaml.safe_load(config) or {}
        self.metrics = _NoMetrics()
        self.request_ids: dict[int, str] = {}

    @property
    def system_properties(self) -> dict[str, Any]:
        """Where the model is and what it may use; ``gpu_id`` is always None."""
        return self._system_properties

    def batch(self, rows: int) -> "Context":
        """This context, for a batch of so many rows."""
        self.request_ids = {index: str(index) for index in range(rows)}
        return self

    def get_request_id(self, idx: int = 0) -> str | None:
        """The number of the row in its batch, as text."""
        return self.request_ids.get(idx)

    def get_request_header(self, idx: int, key: str) -> None:
        """None: rows have no headers."""

    def get_all_request_header(self, idx: int) -> dict[str, str]:
        """Empty: rows have no headers."""
        return {}

    def set_response_content_type(self, idx: int, value: str) -> None:
        """Answers are JSON. Raises NotImplementedError for anything else."""
        if value not in ("application/json", "text/plain"):
            raise NotImplementedError(f"answers are JSON; the content type {value} can't be set")

    def set_response_status(self, code: int = 200, phrase: str = "", idx: int = 0) -> None:
        """Raises NotImplementedError but for 200: rows share a response."""
        if code != 200:
            raise NotImplementedError("a handler can't set the status; raise an exception to refuse the request")


class _NoMetrics:
    """Takes a handler's own metrics and drops them."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        if not name.startswith("add_"):
            raise AttributeError(name)
        return lambda *_, **__: None


def build(bundle: Bundle, code: types.ModuleType) -> HandlerModule:
    """The module of a bundle's handler, initialized; ``code`` is the handler's file. Raises BundleError.

    Also raises what the handler's own code raises.
    """
    name, context = bundle.handler.class_name, Context(bundle)
    function = vars(code).get("handle")
    if name is None and callable(function):
        # TorchServe's way of telling a function to initialize itself.
        function(None, context)
        return HandlerModule(function, context)
    handler = _handler_class(bundle, code, name)()
    handler.context = context
    if hasattr(handler, "initialize"):
        handler.initialize(context)
    module = HandlerModule(getattr(handler, "handle", None) or _stages(handler), context)
    if isinstance(getattr(handler, "model", None), torch.nn.Module):
        # So that it is put into evaluation mode with everything else.
        module.model = handler.model
    return module


def _handler_class(bundle: Bundle, code: types.ModuleType, name: str | None) -> type:
    classes = {
        key: value
        for key, value in vars(code).items()
        if inspect.isclass(value) and value.__module__ == code.__name__ and _can_handle(value)
    }
    if name is None and len(classes) == 1:
        return next(iter(classes.values()))
    if name in classes:
        return classes[name]
    found = f"it has {', '.join(sorted(classes))}" if classes else "it has none"
    wanted = f"the class {name}" if name else "a function handle and not one class"
    raise BundleError(
        f"{bundle.label}: {bundle.handler.file} lacks {wanted} with the method handle, or preprocess, inference and "
        f"postprocess; {found}; name the right one in handler.class"
    )


def _can_handle(cls: type) -> bool:
    return hasattr(cls, "handle") or all(hasattr(cls, step) for step in ("preprocess", "inference", "postprocess"))


def _stages(handler: Any) -> Callable[[list[dict[str, Any]], Context], Any]:
    return lambda data, _: handler.postprocess(handler.inference(handler.preprocess(data)))


def _body(row: bytes) -> Any:
    try:
        value = json.loads(row)
    except (ValueError, RecursionError):
        return bytearray(row)
    return value if isinstance(value, dict | list) else bytearray(row)
