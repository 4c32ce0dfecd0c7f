"""LitServe with its batches."""

import os

import litserve
import torch
from simplemodel import load


class Predict(litserve.LitAPI):
    def setup(self, device):
        self.model = load()

    def decode_request(self, request):
        return torch.tensor(request["data"])

    def predict(self, rows):
        with torch.inference_mode():
            return self.model(rows).flatten().tolist()

    def encode_response(self, output):
        return {"output": output}


if __name__ == "__main__":
    server = litserve.LitServer(Predict(max_batch_size=64), accelerator="cpu", workers_per_device=2)
    server.run(host="127.0.0.1", port=int(os.environ["BENCH_PORT"]), generate_client_file=False, log_level="warning")
