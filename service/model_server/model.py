"""Running a loaded model."""

from collections.abc import Sequence
from typing import Any

import torch

from model_server.bundle import Bundle
from model_server.errors import ModelFailed
from model_server.payload import BadRequest, NotFinite


class Model:
    """A loaded model in evaluation mode. Not to be called by two threads at once.

    ``module`` maps what its ``preprocess`` makes of rows, or else a tensor of shape [rows, …], to what its
    ``postprocess`` takes, or else a tensor of shape [rows, …]. ``batch_seconds`` is what a full batch was measured to
    take.
    """

    def __init__(self, module: torch.nn.Module, bundle: Bundle, device: str = "cpu") -> None:
        self.bundle = bundle
        self.name = bundle.name
        self.version = bundle.version
        self.max_batch_rows = bundle.max_batch_rows
        self.max_delay_seconds = bundle.max_delay_ms / 1000
        self.batch_seconds = 0.0
        self.module = module
        self.device = device
        self._dtype = getattr(torch, bundle.input.dtype, None)
        self._preprocess = getattr(module, "preprocess", None)
        self._postprocess = getattr(module, "postprocess", None)
        self.prepare = bundle.input.prepare

    def predict(self, parts: Sequence[Sequence[Any]], wants_tensor: bool = False) -> list[Any]:
        """Run the rows of several requests as one batch; the outputs of each request.

        ``parts`` are what ``prepare`` returned: lists with a value for each row, or tensors of shape [rows, …], but not
        both together. A request's outputs are a list with a JSON value for each row, or, where ``wants_tensor`` and
        the model has no ``postprocess`` of its own, a tensor of shape [rows, …]. Raises ModelFailed, NotFinite where a
        classifier's scores aren't, and BadRequest where a TorchServe handler refuses a row.
        """
        counts = [len(part) for part in parts]
        try:
            with torch.inference_mode():
                output = self.module(self.batch(parts))
                if wants_tensor and self._postprocess is None:
                    self.bundle.output.check(output)
                    return list(self._host(output).split(counts))
                values = self.bundle.output.values(output) if self._postprocess is None else self._postprocess(output)
            if isinstance(values, torch.Tensor):
                values = values.tolist()
            if not isinstance(values, list) or len(values) != sum(counts):
                raise TypeError(f"postprocess must return a list with one value for each of {sum(counts)} rows")
        except (BadRequest, NotFinite):
            raise
        except (Exception, SystemExit) as error:
            raise ModelFailed(f"the model failed: {type(error).__name__}: {error}") from error
        if len(counts) == 1:
            return [values]
        split, end = [], 0
        for count in counts:
            split.append(values[end : end + count])
            end += count
        return split

    def to_device(self, device: str) -> None:
        """Move the model to a device of PyTorch's, ``cuda`` for example."""
        self.module.to(device)
        self.device = device

    def batch(self, parts: Sequence[Sequence[Any]]) -> Any:
        """What the module gets of ``parts``."""
        first = parts[0]
        if isinstance(first, torch.Tensor):
            batch = first if len(parts) == 1 else torch.cat(list(parts))
            if self._preprocess is None:
                return batch.to(self.device)
            # Images are tensors however they came; numbers are lists.
            return self._preprocessed(list(batch) if self.bundle.input.kind == "image" else batch.tolist())
        rows = first if len(parts) == 1 else [row for part in parts for row in part]
        if self._preprocess is not None:
            return self._preprocessed(rows)
        if isinstance(rows[0], torch.Tensor):
            return torch.stack(rows).to(self.device)
        return torch.tensor(rows, dtype=self._dtype, device=self.device)

    def _preprocessed(self, rows: list[Any]) -> Any:
        made = self._preprocess(rows)
        return made.to(self.device) if isinstance(made, torch.Tensor) else made

    @staticmethod
    def _host(output: torch.Tensor) -> torch.Tensor:
        return output.cpu()
