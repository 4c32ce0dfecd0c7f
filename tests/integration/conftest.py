"""An edge with both colours behind it."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from edge_box import COLOURS, Colour, Edge  # noqa: E402


@pytest.fixture(scope="session")
def running():
    # Socket paths are limited to 107 bytes, and pytest's own temporary directories are long.
    directory = Path(tempfile.mkdtemp(prefix="edge-", dir="/tmp"))
    colours = {}
    try:
        edge = Edge(directory)
        colours = {name: Colour(edge.run, name) for name in COLOURS}
        with edge.running():
            yield edge, colours
    finally:
        for colour in colours.values():
            colour.stop()
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def edge(running):
    """Blue is live, green is idle, and nothing else is in the routing state."""
    running[0].route("blue")
    return running[0]


@pytest.fixture
def colours(running):
    """The stand-ins of both colours, by name."""
    return running[1]
