"""BentoML as its first steps have it: two workers, without batches."""

import bentoml
import torch
from simplemodel import load


@bentoml.service(workers=2)
class Predict:
    def __init__(self) -> None:
        self.model = load()

    @bentoml.api
    def predict(self, data: list[float]) -> dict:
        with torch.inference_mode():
            return {"output": self.model(torch.tensor([data])).item()}
