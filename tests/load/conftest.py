"""Options of the load tests, which need a whole appliance and are collected only where one is named."""

import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from swap_client import DEFAULT_URL, Settings  # noqa: E402
from swap_runs import RELOAD_COMMAND, Host, expected_seconds, recorded_lab  # noqa: E402

PAUSE_S = (0.2, 1.0)
REPORTS = HERE.parents[1] / "reports"


NEEDS_APPLIANCE = "test_swap_under_load.py"


def pytest_addoption(parser):
    group = parser.getgroup("appliance under load")
    group.addoption("--appliance-url", help="the edge; default: APPLIANCE_URL or http://127.0.0.1:8080")
    group.addoption(
        "--host-command",
        help="prefix that runs a command on the appliance's host, for example 'ssh -F FILE lab', or 'env' where that "
        "is this machine; default: APPLIANCE_HOST_COMMAND",
    )
    group.addoption("--swap-count", type=int, help="swaps, and reloads, in a test; default: APPLIANCE_SWAPS or 20")
    group.addoption("--load-clients", type=int, help="clients; default: APPLIANCE_CLIENTS or 30")
    group.addoption("--think-max-ms", type=float, help="longest pause; default: APPLIANCE_THINK_MAX_MS or 100")
    group.addoption("--reload-command", help="default: APPLIANCE_RELOAD_COMMAND or 'sudo systemctl reload nginx'")
    group.addoption("--report-dir", help="default: APPLIANCE_REPORTS or reports/ in the repository's root")


def setting(config, option, variable, default):
    """An option, else an environment variable, else what the lab tool recorded, else a default."""
    given = config.getoption(option, default=None)
    if given is not None:
        return given
    return type(default)(os.environ.get(variable) or recorded_lab().get(variable, default))


def pytest_ignore_collect(collection_path, config):
    if collection_path.name != NEEDS_APPLIANCE or setting(config, "--host-command", "APPLIANCE_HOST_COMMAND", ""):
        return None
    asked_for = [Path(str(argument).split("::")[0]).resolve() for argument in config.args]
    if any(path == HERE or HERE in path.parents for path in asked_for):
        # Asked for by name and not run must not look like a success.
        raise pytest.UsageError("load tests need an appliance: run `make up`, or give --host-command")
    return True


@pytest.fixture
def host(pytestconfig):
    return Host(setting(pytestconfig, "--host-command", "APPLIANCE_HOST_COMMAND", ""))


@pytest.fixture
def count(pytestconfig):
    return setting(pytestconfig, "--swap-count", "APPLIANCE_SWAPS", 20)


@pytest.fixture
def pause_s():
    return PAUSE_S


@pytest.fixture
def load_settings(pytestconfig, count, pause_s):
    return Settings(
        url=setting(pytestconfig, "--appliance-url", "APPLIANCE_URL", DEFAULT_URL),
        clients=setting(pytestconfig, "--load-clients", "APPLIANCE_CLIENTS", 30),
        think_max_s=setting(pytestconfig, "--think-max-ms", "APPLIANCE_THINK_MAX_MS", 100.0) / 1000,
        max_duration_s=expected_seconds(count, pause_s),
    )


@pytest.fixture
def reload_command(pytestconfig):
    return setting(pytestconfig, "--reload-command", "APPLIANCE_RELOAD_COMMAND", RELOAD_COMMAND)


@pytest.fixture
def reports(pytestconfig):
    return Path(setting(pytestconfig, "--report-dir", "APPLIANCE_REPORTS", str(REPORTS)))
