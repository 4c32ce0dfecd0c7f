"""Settings, their defaults and what is refused."""

import os

import pytest
from model_server.config import Config, ConfigError


def test_defaults():
    config = Config.from_environment({})
    assert (config.colour, config.release) == ("none", "")
    assert config.workers == len(os.sched_getaffinity(0))
    assert (str(config.bundle_dir), str(config.socket_dir)) == ("/bundle", "/run/appliance")
    assert (config.max_body_bytes, config.queue_limit, config.drain_seconds) == (8_388_608, 128, 25)
    assert config.hang_seconds == 60 and config.log_error_messages is False
    assert Config.from_environment({"MODEL_LOG_ERROR_MESSAGES": "1"}).log_error_messages is True
    assert (config.host, config.port, config.cors_origins) == ("127.0.0.1", None, ())


def test_default_of_workers_on_a_large_machine(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(96))
    assert Config.from_environment({}).workers == 64


def test_origins_are_separated_by_commas_or_spaces():
    config = Config.from_environment({"MODEL_CORS_ORIGINS": "https://a.example, https://b.example"})
    assert config.cors_origins == ("https://a.example", "https://b.example")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MODEL_COLOUR", "red"),
        ("MODEL_WORKERS", "0"),
        ("MODEL_WORKERS", "two"),
        ("MODEL_WORKERS", "-1"),
        ("MODEL_WORKERS", "\u0662"),
        ("MODEL_QUEUE_LIMIT", "1.5"),
        ("MODEL_PORT", "70000"),
        ("MODEL_LOG_ERROR_MESSAGES", "yes"),
        ("MODEL_SOCKET_DIR", "/" + "x" * 100),
    ],
)
def test_refused(name, value):
    with pytest.raises(ConfigError, match=name):
        Config.from_environment({name: value})
