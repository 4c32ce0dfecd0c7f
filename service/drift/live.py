"""Which bundle is live, by the files that docs/contracts.md describes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from drift.errors import DriftError
from drift.reference import Reference, parse

COLOURS = ("blue", "green")


@dataclass(frozen=True)
class Model:
    """A model of a bundle; `reference` is None where the bundle brings none for it."""

    name: str
    version: str
    reference: Reference | None


def bundle(appliance_dir: Path, config_dir: Path) -> Path | None:
    """The live bundle's directory; None where no colour is live yet. Raises DriftError."""
    current = appliance_dir / "routing/current"
    live = [colour for colour in COLOURS if (current / colour).is_file()]
    if not live:
        return None
    path = config_dir / f"{live[0]}.env"
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise DriftError(f"{path} can't be read: {error.strerror}") from None
    for line in lines:
        key, _, value = line.partition("=")
        if key == "MODEL_BUNDLE" and value:
            return Path(value)
    raise DriftError(f"{path} names no MODEL_BUNDLE: deploy to {live[0]} again")


def models(directory: Path) -> dict[str, Model]:
    """The models of the bundle in `directory` by their names, the default first. Raises DriftError."""
    manifest = _manifest(directory)
    parts = [directory / str(name) for name in manifest.get("models") or []]
    found = [_model(part, _manifest(part)) for part in parts] if parts else [_model(directory, manifest)]
    return {model.name: model for model in found}


def _manifest(directory: Path) -> dict[str, Any]:
    path = directory / "manifest.yaml"
    try:
        manifest = yaml.safe_load(path.read_bytes())
        # Both are needed below; who lacks one is no bundle.
        return {**manifest, "name": str(manifest["name"]), "version": str(manifest["version"])}
    except OSError as error:
        raise DriftError(f"{path} can't be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, TypeError, KeyError) as error:
        raise DriftError(f"{path} isn't a bundle's manifest: {type(error).__name__}: {error}") from None


def _model(directory: Path, manifest: dict[str, Any]) -> Model:
    name = manifest.get("reference")
    if name is None:
        return Model(manifest["name"], manifest["version"], None)
    path = directory / str(name)
    try:
        return Model(manifest["name"], manifest["version"], parse(path.read_bytes()))
    except OSError as error:
        raise DriftError(f"{path} can't be read: {error.strerror}") from None
    except DriftError as error:
        raise DriftError(f"{path}: {error}") from None
