"""Handlers of images."""

import base64
from typing import Any

import torch
from model_server.images import read_rgb
from model_server.payload import BadRequest

from ts.torch_handler.base_handler import BaseHandler


class VisionHandler(BaseHandler):
    """Rows are encoded images, base64 of such, or lists of numbers; ``image_processing`` makes a tensor of an image."""

    image_processing: Any = None

    def preprocess(self, data: list[dict[str, Any]]) -> torch.Tensor:
        """A tensor of all images. Raises BadRequest, as the service does for models of images."""
        return torch.stack([self._tensor(row.get("data") or row.get("body")) for row in data]).to(self.device)

    def _tensor(self, image: Any) -> torch.Tensor:
        try:
            if isinstance(image, str):
                image = base64.b64decode(image)
            if not isinstance(image, bytes | bytearray):
                return torch.as_tensor(image, dtype=torch.float32)
        except (ValueError, TypeError, RuntimeError):
            raise BadRequest("a row must be an image, an image in base64 or a list of numbers") from None
        return self.image_processing(read_rgb(image))
