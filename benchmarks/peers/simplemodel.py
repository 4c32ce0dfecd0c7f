"""The model that every peer serves, loaded as each of their guides would have it: once, in evaluation mode."""

import importlib.util
import os
from pathlib import Path

import torch


def load() -> torch.nn.Module:
    """The bundle in the directory BENCH_BUNDLE, on one thread, as there are as many processes as cores."""
    torch.set_num_threads(1)
    bundle = Path(os.environ["BENCH_BUNDLE"])
    specification = importlib.util.spec_from_file_location("bundle_model", bundle / "model.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    model = module.SimpleModel(hidden=4)
    model.load_state_dict(torch.load(bundle / "weights.pth", weights_only=True))
    return model.eval()
