"""Making a bundle's PyTorch module: its code and its weights."""

import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from model_server import handlers
from model_server.bundle import Bundle, BundleError, Entry

# A bundle's directory must stay as it was delivered.
sys.dont_write_bytecode = True

_PREFIX = "bundle_model_"
_importable: list[Path] = []


def build(bundle: Bundle) -> torch.nn.Module:
    """The bundle's module with its weights, in evaluation mode. Raises BundleError, and what its code raises."""
    if bundle.handler is not None:
        handlers.offer_torchserve()
        module = handlers.build(bundle, _run(bundle, bundle.handler.file))
    elif bundle.weights_format == "torchscript":
        module = _torchscript(bundle)
    else:
        module = _instance(bundle, bundle.entry)
        if bundle.weights is not None:
            _load_state(module, bundle)
    module.eval()
    # One by one, since TorchScript's modules lack requires_grad_.
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    return module


def make_importable(directory: Path) -> None:
    """Have ``import`` find the bundle's own files, and those of no bundle that was loaded before."""
    forget_imports()
    _importable.append(directory)
    sys.path.insert(0, str(directory))


def forget_imports() -> None:
    """Take bundles off the path of ``import``, and what was imported from them: two may use the same names."""
    while _importable:
        directory = _importable.pop()
        sys.path.remove(str(directory))
        for name, module in list(sys.modules.items()):
            file = getattr(module, "__file__", None)
            if file and Path(file).is_relative_to(directory) and not name.startswith(_PREFIX):
                del sys.modules[name]


def run_file(path: Path, title: str) -> types.ModuleType:
    """Run a Python file as a module that is kept under ``title``. Raises ImportError, whatever the file raised."""
    name = _PREFIX + title
    code = types.ModuleType(name)
    code.__file__ = str(path)
    sys.modules[name] = code
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), code.__dict__)
    except (Exception, SystemExit) as error:
        raise ImportError(f"{path.name} can't be imported: {summary(error)}") from error
    return code


def module_classes(code: types.ModuleType) -> dict[str, type[torch.nn.Module]]:
    """The classes of modules that a file defines itself, by name."""
    return {
        name: value
        for name, value in vars(code).items()
        if isinstance(value, type) and issubclass(value, torch.nn.Module) and value.__module__ == code.__name__
    }


def summary(error: BaseException) -> str:
    """An exception on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]


def _run(bundle: Bundle, file: str) -> types.ModuleType:
    try:
        return run_file(bundle.directory / file, f"{bundle.name}_{Path(file).stem}".replace("-", "_"))
    except ImportError as error:
        raise BundleError(f"{bundle.label}: {error}") from error


def _instance(bundle: Bundle, entry: Entry) -> torch.nn.Module:
    cls = getattr(_run(bundle, entry.file), entry.class_name, None)
    if not (isinstance(cls, type) and issubclass(cls, torch.nn.Module)):
        raise BundleError(f"{bundle.label}: {entry.file} has no class {entry.class_name} that is a torch.nn.Module")
    try:
        return cls(**entry.arguments)
    except (Exception, SystemExit) as error:
        raise BundleError(
            f"{bundle.label}: {entry.class_name} can't be made from entry.arguments: {summary(error)}"
        ) from error


def _torchscript(bundle: Bundle) -> torch.nn.Module:
    try:
        with warnings.catch_warnings():
            # That it is deprecated is for the author to know, and no failure here.
            warnings.simplefilter("ignore", DeprecationWarning)
            return torch.jit.load(bundle.directory / bundle.weights, map_location="cpu")
    except Exception as error:
        raise BundleError(f"{bundle.label}: {bundle.weights} is not usable TorchScript: {summary(error)}") from error


def _load_state(module: torch.nn.Module, bundle: Bundle) -> None:
    try:
        state = _READERS[bundle.weights_format](bundle.directory / bundle.weights)
    except Exception as error:
        raise BundleError(
            f"{bundle.label}: {bundle.weights} can't be loaded as {bundle.weights_format}: {summary(error)}"
        ) from error
    try:
        module.load_state_dict(state)
    except Exception as error:
        raise BundleError(
            f"{bundle.label}: {bundle.weights} doesn't fit {bundle.entry.class_name}: {summary(error)}"
        ) from error


def read_state_dict(path: Path) -> dict[str, Any]:
    """Read a state dict, and nothing else that ``torch.save`` may have written.

    Raises ValueError, OSError, MemoryError.
    """
    try:
        # No second try without weights_only: that would run whatever code the file holds.
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    # PyTorch's own advice is long, and to trust the file.
    except Exception as error:
        known = next((text for word, text in _UNUSABLE.items() if word in str(error)), summary(error)[:200])
        raise ValueError(f"{known}; {_ADVICE}") from None
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__} and no state dict; {_ADVICE}")
    nested = [key for key, value in state.items() if isinstance(value, dict) and _tensors(value)]
    if nested and not _tensors(state):
        raise ValueError(
            f"it is a checkpoint with the state dict under {nested[0]!r}; save that alone: "
            f"torch.save(torch.load(PATH, weights_only=True)[{nested[0]!r}], PATH)"
        )
    return state


def _tensors(state: dict[str, Any]) -> bool:
    return any(isinstance(value, torch.Tensor) for value in state.values())


def _read_safetensors(path: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(path, device="cpu")


_ADVICE = "save the weights with torch.save(model.state_dict(), PATH)"
_UNUSABLE = {
    "TorchScript": 'it is TorchScript: set "weights_format: torchscript" and leave entry out',
    "Unsupported global": "it holds more than tensors, which could be code and isn't loaded",
    "Unsupported operand": "it holds more than tensors, which could be code and isn't loaded",
    "Unsupported class": "it holds more than tensors, which could be code and isn't loaded",
}
_READERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "state_dict": read_state_dict,
    "safetensors": _read_safetensors,
}
