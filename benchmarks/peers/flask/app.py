"""Flask, bare: no validation, no metrics, no logs, no batches."""

import torch
from flask import Flask, jsonify, request
from simplemodel import load

app = Flask(__name__)
model = load()


@app.post("/predict")
def predict():
    with torch.inference_mode():
        return jsonify(output=model(torch.tensor([request.get_json()["data"]])).item())
