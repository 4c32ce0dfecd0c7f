#!/usr/bin/env python3
"""What PyTorch itself can do with a bundle's model: a loop of batches in each of some processes, without a server.

Prints one line of JSON: `rate`, rows a second over all processes, and `output`, what the model makes of the row.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "service"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("data", type=Path, help="one row: an encoded image, or float32 numbers as bytes")
    parser.add_argument("--kind", choices=["image", "tensor"], required=True, help="image: each one is decoded again")
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument("--processes", type=int, required=True)
    given = parser.parse_args()

    # The bundle is loaded as the service does it, so that the same weights in the same form run on both sides.
    from model_server import bundle, loading

    model = loading.load(bundle.read(given.bundle)).default
    data, specification = given.data.read_bytes(), model.bundle.input
    import torch

    tensor = (
        torch.frombuffer(bytearray(data), dtype=torch.float32).view(1, *specification.shape)[0]
        if (given.kind == "tensor")
        else None
    )

    def forward(count: int) -> torch.Tensor:
        # One by one, as requests come: of the same image twice in a list the second one would cost nothing.
        rows = [specification.prepare([data])[0] if tensor is None else tensor for _ in range(count)]
        return model.module(torch.stack(rows))

    def loop(barrier: multiprocessing.Barrier, rates: multiprocessing.Queue) -> None:
        with torch.inference_mode():
            forward(given.batch)
            barrier.wait()
            rows, started = 0, time.perf_counter()
            while (elapsed := time.perf_counter() - started) < given.seconds:
                forward(given.batch)
                rows += given.batch
            rates.put(rows / elapsed)

    # Forked, so that the weights are there once, as in the service.
    context = multiprocessing.get_context("fork")
    barrier, rates = context.Barrier(given.processes), context.Queue()
    children = [context.Process(target=loop, args=(barrier, rates), daemon=True) for _ in range(given.processes)]
    for child in children:
        child.start()
    rate = sum(rates.get(timeout=given.seconds + 60) for _ in children)
    with torch.inference_mode():
        output = forward(1)[0].tolist()
    print(json.dumps({"rate": rate, "output": output}))


if __name__ == "__main__":
    main()
