"""Bundles to break, and short directories for sockets."""

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# The tests are imported by file, which puts neither this folder nor the package on the path.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).resolve().parents[3] / "service")]
# prometheus_client looks for it when it is imported.
os.environ["PROMETHEUS_MULTIPROC_DIR"] = tempfile.mkdtemp(prefix="metrics-")

from bundle_making import SHIPPED, write_sums  # noqa: E402


@pytest.fixture
def bundle_dir(tmp_path: Path) -> Path:
    """A copy of simplemodel 1.0.0 that a test may change."""
    copy = tmp_path / "bundle"
    copy.mkdir()
    for path in (SHIPPED / "1.0.0").iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    return copy


@pytest.fixture
def edit(bundle_dir: Path) -> Callable[..., Path]:
    """Replaces text in a file of the bundle; the checksums are right again afterwards."""

    def change(name: str, old: str, new: str) -> Path:
        path = bundle_dir / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))
        write_sums(bundle_dir)
        return bundle_dir

    return change


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A directory whose path leaves room for the name of a socket."""
    with tempfile.TemporaryDirectory(prefix="ms-", dir="/tmp") as name:
        yield Path(name)
