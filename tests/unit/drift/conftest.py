"""Makes what these tests share importable, and makes hosts and clusters for them."""

import sys
from pathlib import Path

import pytest

# The power cuts are the engine's tests'.
TESTS = Path(__file__).resolve().parent
sys.path[:0] = [str(TESTS), str(TESTS.parent / "rollout")]

from drift_box import Box, Kafka  # noqa: E402


@pytest.fixture
def box(tmp_path):
    box = Box(tmp_path)
    yield box
    box.kill()


@pytest.fixture
def kafka():
    kafka = Kafka()
    yield kafka
    kafka.stop()
