"""Mosec with its batches, over a pipeline of one stage."""

import torch
from mosec import Server, Worker
from simplemodel import load


class Predict(Worker):
    def __init__(self):
        self.model = load()

    def forward(self, data):
        with torch.inference_mode():
            outputs = self.model(torch.tensor([row["data"] for row in data]))
        return [{"output": value} for value in outputs.flatten().tolist()]


if __name__ == "__main__":
    server = Server()
    # Without a wait, a batch is what is queued.
    server.append_worker(Predict, num=2, max_batch_size=64, route="/predict")
    server.run()
