"""Faster variants of a model, each held to what the original answers on the bundle's examples.

All of them are made in the parent: made in the workers, each would have weights of its own instead of sharing them.
Measured with one thread: ``torchscript`` 2.2 times and ``channels_last`` 1.5 times as fast on a small convolutional
network, ``quantize`` 5.7 times on one of large linear layers. ``bfloat16`` is for processors that compute in it; on
others it is far slower than the original.
"""

import contextlib
import copy
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from model_server.bundle import Bundle, BundleError


def faster(module: torch.nn.Module, bundle: Bundle, batches: Sequence[Any], full: Any) -> torch.nn.Module:
    """The variant of ``module`` that the bundle's ``speed`` asks for, with the same pre- and postprocessing.

    ``batches`` are what the module gets of the examples: tensors of shape [rows, …]; ``full`` is what it gets of a full
    batch of their rows, or None. Raises BundleError where the variant can't be made, or where an output differs by
    more than ``speed.tolerance`` from the original's.
    """
    if not all(isinstance(batch, torch.Tensor) for batch in batches):
        raise _refused(bundle, "the model must take one tensor; its preprocess makes something else")
    with torch.inference_mode():
        wanted = [module(batch) for batch in batches]
    if not all(isinstance(output, torch.Tensor) for output in wanted):
        raise _refused(bundle, "the model must return one tensor")
    if bundle.speed.channels_last and batches[0].dim() != 4:
        raise _refused(
            bundle,
            f"channels_last is for batches of shape [rows, channels, height, width], not {list(batches[0].shape)}",
        )
    try:
        with warnings.catch_warnings(), torch.inference_mode():
            # That tracing and quantisation are going to move elsewhere; the lock holds the version that has them.
            warnings.simplefilter("ignore")
            variant = _Variant(module, bundle, max(batches, key=len), wanted[0].dtype)
            got = [variant(batch) for batch in batches]
            # A trace of single rows may know of one row only, and answer for more without an error.
            if (output := _of_full(module, full)) is not None:
                wanted.append(output)
                got.append(variant(full))
    except Exception as error:
        raise _refused(bundle, f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]) from error
    deviations = [deviation(left, right) for left, right in zip(wanted, got, strict=True)]
    worst = max(deviations)
    if not worst <= bundle.speed.tolerance:
        where = "" if max(deviations[: len(batches)]) == worst else f" in a batch of {len(full)}"
        raise _refused(
            bundle,
            f"outputs on the examples{where} deviate by up to {worst:.3g} from the original model's; speed.tolerance "
            f"allows {bundle.speed.tolerance:g}. Raise it if you can live with that, or leave the option out",
        )
    return variant


class _Variant(torch.nn.Module):
    """A copy of a module in another form, which takes and returns what the module does."""

    def __init__(self, module: torch.nn.Module, bundle: Bundle, batch: torch.Tensor, output_type: torch.dtype) -> None:
        super().__init__()
        self._output_type = output_type
        speed = bundle.speed
        self._type = torch.bfloat16 if speed.dtype else None
        self._format = torch.channels_last if speed.channels_last else torch.preserve_format
        inner = copy.deepcopy(module).to(dtype=self._type, memory_format=self._format)
        for name in ("preprocess", "postprocess"):
            if hasattr(inner, name):
                setattr(self, name, getattr(inner, name))
        if speed.quantize:
            inner = torch.ao.quantization.quantize_dynamic(inner, {torch.nn.Linear}, dtype=torch.qint8, inplace=True)
        if speed.torchscript:
            inner = _traced(inner, self._input(batch))
        self.inner = inner

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        output = self.inner(self._input(batch))
        return output.to(self._output_type) if output.dtype == self._type else output

    def _input(self, batch: torch.Tensor) -> torch.Tensor:
        kind = self._type if batch.is_floating_point() else None
        return batch.to(dtype=kind or batch.dtype, memory_format=self._format)


def _traced(module: torch.nn.Module, batch: torch.Tensor) -> torch.nn.Module:
    if not isinstance(module, torch.jit.ScriptModule):
        # What a trace gets wrong, a branch that depends on the data for example, the examples show.
        module = torch.jit.trace(module, batch, check_trace=False)
    return torch.jit.optimize_for_inference(torch.jit.freeze(module.eval()))


def _of_full(module: torch.nn.Module, full: Any) -> torch.Tensor | None:
    # Rows that don't go together are tried one by one when they are served.
    with contextlib.suppress(Exception):
        if isinstance(full, torch.Tensor) and isinstance(output := module(full), torch.Tensor):
            return output
    return None


def deviation(wanted: torch.Tensor, got: Any) -> float:
    """How far apart two tensors are at most; infinitely where they differ in shape or type."""
    if not isinstance(got, torch.Tensor) or got.shape != wanted.shape or got.dtype != wanted.dtype:
        return float("inf")
    # Equal infinities have no difference, and a NaN is as far away as can be.
    difference = torch.where(wanted == got, 0.0, (wanted.double() - got.double()).abs())
    return difference.nan_to_num(nan=float("inf"), posinf=float("inf")).max().item()


def _refused(bundle: Bundle, reason: str) -> BundleError:
    return BundleError(f"{bundle.label}: speed ({', '.join(bundle.speed.options)}): {reason}")
