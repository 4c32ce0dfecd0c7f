"""Settings, their defaults and what is refused."""

import os

import pytest
from model_server.config import Config, ConfigError


def test_defaults():
    config = Config.from_environment({})
    assert (config.colour, config.release) == ("none", "")
    assert config.workers == len(os.sched_getaffinity(0))
    assert (str(config.bundle_dir), str(config.socket_dir)) == ("/bundle", "/run/appliance")
    assert (config.max_body_bytes, config.queue_limit, config.drain_seconds) == (1_048_576, 32, 25)
    assert config.hang_seconds == 60


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MODEL_COLOUR", "red"),
        ("MODEL_WORKERS", "0"),
        ("MODEL_WORKERS", "two"),
        ("MODEL_WORKERS", "-1"),
        ("MODEL_WORKERS", "\u0662"),
        ("MODEL_QUEUE_LIMIT", "1.5"),
        ("MODEL_SOCKET_DIR", "/" + "x" * 100),
    ],
)
def test_refused(name, value):
    with pytest.raises(ConfigError, match=name):
        Config.from_environment({name: value})
