"""Handlers that tell what an image shows."""

import torch
from PIL import Image

from ts.torch_handler.vision_handler import VisionHandler
from ts.utils.util import map_class_to_label

_SIDE, _SHORTER_SIDE = 224, 256
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def scaled_and_normalised(image: Image.Image) -> torch.Tensor:
    """The centre of an RGB image, float32 of shape [3, 224, 224], normalised as models trained on ImageNet expect."""
    scale = _SHORTER_SIDE / min(image.size)
    image = image.resize((int(image.width * scale), int(image.height * scale)), Image.Resampling.BILINEAR)
    left, top = round((image.width - _SIDE) / 2), round((image.height - _SIDE) / 2)
    image = image.crop((left, top, left + _SIDE, top + _SIDE))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(_SIDE, _SIDE, 3)
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (_MEAN, _STD))
    return (pixels.permute(2, 0, 1) / 255 - mean) / std


class ImageClassifier(VisionHandler):
    """The most probable classes of an image, by label where there is an index_to_name.json."""

    topk = 5
    image_processing = staticmethod(scaled_and_normalised)

    def set_max_result_classes(self, topk: int) -> None:
        """How many classes an answer has."""
        self.topk = topk

    def get_max_result_classes(self) -> int:
        """How many classes an answer has."""
        return self.topk

    def postprocess(self, data: torch.Tensor) -> list[dict[str, float]]:
        """For each row its most probable classes with their probabilities."""
        found = torch.nn.functional.softmax(data, dim=1).topk(min(self.topk, data.shape[1]), dim=1)
        return map_class_to_label(found.values.tolist(), self.mapping, found.indices.tolist())
