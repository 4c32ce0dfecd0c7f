"""FastAPI, bare: validation by pydantic, no metrics, no logs, no batches."""

import torch
from fastapi import FastAPI
from pydantic import BaseModel
from simplemodel import load

app = FastAPI()
model = load()


class Row(BaseModel):
    data: list[float]


class Prediction(BaseModel):
    output: float


# Not `def`, which runs in a thread of a pool: for a model of microseconds that is slower.
@app.post("/predict")
async def predict(row: Row) -> Prediction:
    with torch.inference_mode():
        return Prediction(output=model(torch.tensor([row.data])).item())
