"""A small multi-layer perceptron: two numbers in, one probability out."""

import torch


class SimpleModel(torch.nn.Module):
    """Maps float32 of shape [rows, 2] to probabilities, float32 of shape [rows, 1]."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(
            torch.nn.Linear(2, hidden),
            torch.nn.Tanh(),
            torch.nn.Linear(hidden, 1),
            torch.nn.Sigmoid(),
        )

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return self.layers(rows)
