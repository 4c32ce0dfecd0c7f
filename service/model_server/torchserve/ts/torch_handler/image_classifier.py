"""Handlers that tell what an image shows."""

import torch
from model_server.images import IMAGENET

from ts.torch_handler.vision_handler import VisionHandler
from ts.utils.util import map_class_to_label


class ImageClassifier(VisionHandler):
    """The most probable classes of an image, by label where there is an index_to_name.json."""

    topk = 5
    # The centre of an RGB image, float32 of shape [3, 224, 224].
    image_processing = staticmethod(IMAGENET.tensor)

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
