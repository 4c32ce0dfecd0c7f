"""The class that most handlers derive from."""

import os
from pathlib import Path
from typing import Any

import torch
from model_server import modules

from ts.utils.util import list_classes_from_module, load_label_mapping


class BaseHandler:
    """Loads the model that the archive names, and runs preprocess, inference and postprocess."""

    def __init__(self) -> None:
        self.model: torch.nn.Module | None = None
        self.mapping: dict[str, str] | None = None
        self.device = torch.device("cpu")
        self.map_location = "cpu"
        self.initialized = False
        self.context: Any = None
        self.manifest: dict[str, Any] | None = None
        self.model_yaml_config: dict[str, Any] = {}

    def initialize(self, context: Any) -> None:
        """Load the model and index_to_name.json. Raises FileNotFoundError, ImportError, ValueError, RuntimeError."""
        self.context = context
        self.manifest = context.manifest
        self.model_yaml_config = context.model_yaml_config
        directory, names = context.system_properties["model_dir"], self.manifest["model"]
        weights = os.path.join(directory, names["serializedFile"]) if names.get("serializedFile") else None
        if names.get("modelFile"):
            self.model = self._load_pickled_model(directory, names["modelFile"], weights)
        elif weights:
            self.model = self._load_torchscript_model(weights)
        else:
            raise FileNotFoundError("the bundle has neither entry nor weights for the handler's base class to load")
        self.model.eval()
        self.mapping = load_label_mapping(os.path.join(directory, "index_to_name.json"))
        self.initialized = True

    def _load_torchscript_model(self, model_pt_path: str) -> torch.nn.Module:
        return torch.jit.load(model_pt_path, map_location=self.map_location)

    def _load_pickled_model(self, model_dir: str, model_file: str, model_pt_path: str | None) -> torch.nn.Module:
        names = self.manifest["model"]
        title = f"{names['modelName']}_{Path(model_file).stem}".replace("-", "_")
        module = modules.run_file(Path(model_dir, model_file), title)
        wanted = names.get("modelClass")
        classes = [getattr(module, wanted)] if wanted else list_classes_from_module(module, torch.nn.Module)
        if len(classes) != 1:
            found = ", ".join(sorted(cls.__name__ for cls in classes)) or "none"
            raise ValueError(f"{model_file} must have one class that is a torch.nn.Module; it has {found}")
        model = classes[0](**names.get("modelArguments", {}))
        if model_pt_path:
            # A file that is no plain state dict could hold code and is refused.
            model.load_state_dict(modules.read_state_dict(Path(model_pt_path)))
        return model

    def preprocess(self, data: Any) -> Any:
        """A tensor of the rows; to be overridden where rows are anything but numbers."""
        rows = [row.get("data") or row.get("body") if isinstance(row, dict) else row for row in data]
        return torch.as_tensor(rows, device=self.device)

    def inference(self, data: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the model without gradients."""
        with torch.inference_mode():
            return self.model(data.to(self.device), *args, **kwargs)

    def postprocess(self, data: Any) -> list[Any]:
        """One value for each row."""
        return data.tolist()

    def handle(self, data: Any, context: Any) -> list[Any]:
        """The answers to a batch of rows."""
        self.context = context
        return self.postprocess(self.inference(self.preprocess(data)))
