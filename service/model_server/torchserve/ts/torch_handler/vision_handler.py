"""Handlers of images."""

import base64
import io
from typing import Any

import torch
from PIL import Image

from ts.torch_handler.base_handler import BaseHandler


class VisionHandler(BaseHandler):
    """Rows are encoded images, base64 of such, or lists of numbers; ``image_processing`` makes a tensor of an image."""

    image_processing: Any = None

    def preprocess(self, data: list[dict[str, Any]]) -> torch.Tensor:
        """A tensor of all images."""
        return torch.stack([self._tensor(row.get("data") or row.get("body")) for row in data]).to(self.device)

    def _tensor(self, image: Any) -> torch.Tensor:
        if isinstance(image, str):
            image = base64.b64decode(image)
        if isinstance(image, bytes | bytearray):
            return self.image_processing(Image.open(io.BytesIO(image)).convert("RGB"))
        return torch.as_tensor(image, dtype=torch.float32)
