"""Helpers that handlers import by these names."""

import inspect
import json
import os
import types
from typing import Any


class PredictionException(Exception):
    """A request that the handler refuses. Clients get 400 with the message for any ``error_code`` of 400 to 499, else
    500 without it.
    """

    def __init__(self, message: str, error_code: int = 500) -> None:
        super().__init__(message)
        self.message = message
        self.error_code = error_code


def list_classes_from_module(module: types.ModuleType, parent_class: type | None = None) -> list[type]:
    """The classes that a module defines itself, those derived from ``parent_class`` where it is given."""
    return [
        member
        for _, member in inspect.getmembers(module, inspect.isclass)
        if member.__module__ == module.__name__ and (parent_class is None or issubclass(member, parent_class))
    ]


def load_label_mapping(mapping_file_path: str) -> dict[str, Any] | None:
    """The labels by class number, as text, from index_to_name.json; None where there is no such file.

    A label may also be a list, whose last entry counts. Raises ValueError for any other form.
    """
    if not os.path.isfile(mapping_file_path):
        return None
    with open(mapping_file_path, encoding="utf-8") as file:
        mapping = json.load(file)
    if not isinstance(mapping, dict):
        raise ValueError("index_to_name.json must be an object with a label for each class number")
    names = mapping.get("object_type_names")
    if isinstance(names, list):
        mapping = {str(number): name for number, name in enumerate(names)}
    labels = {number: label[-1] if isinstance(label, list) and label else label for number, label in mapping.items()}
    if not all(isinstance(label, str) for label in labels.values()):
        raise ValueError("labels in index_to_name.json must be strings, or lists of strings")
    return labels


def map_class_to_label(
    probs: list[list[float]], mapping: dict[str, str] | None = None, lbl_classes: list[list[int]] | None = None
) -> list[dict[str, float]]:
    """For each row its labels with their probabilities; a class without a label is called by its number.

    Without ``lbl_classes`` the probabilities of a row belong to classes 0, 1, 2 and so on.
    """
    answers = []
    for index, row in enumerate(probs):
        classes = range(len(row)) if lbl_classes is None else lbl_classes[index]
        names = [str(number) for number in classes]
        answers.append({(mapping or {}).get(name, name): p for name, p in zip(names, row, strict=True)})
    return answers
