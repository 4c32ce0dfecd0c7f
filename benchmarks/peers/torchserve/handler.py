"""TorchServe with a handler of its own, without batches, which are off by default."""

import sys

import torch


class Handler:
    def initialize(self, context):
        torch.set_num_threads(1)
        folder = context.system_properties["model_dir"]
        sys.path.insert(0, folder)
        from model import SimpleModel

        self.model = SimpleModel(hidden=4)
        self.model.load_state_dict(torch.load(f"{folder}/weights.pth", weights_only=True))
        self.model.eval()

    def handle(self, requests, context):
        with torch.inference_mode():
            outputs = self.model(torch.tensor([request["body"]["data"] for request in requests]))
        return [{"output": value} for value in outputs.flatten().tolist()]
