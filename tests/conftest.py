"""What all tests share."""

import os
import shutil
import sys
from pathlib import Path

import pytest

from lab.programs import PACKAGES, search_path

# A hook: pytest finds it by its name.
from tests.reruns import pytest_terminal_summary  # noqa: F401

# Where `make programs` put what this machine lacks.
os.environ["PATH"] = search_path()
# Programs of the environment that the tests run in, which needn't be activated.
ENVIRONMENT = str(Path(sys.executable).parent)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Where a program of the marker `needs` is missing, a test fails; it is skipped only where nothing can bring it."""
    for name in (name for marker in item.iter_markers("needs") for name in marker.args):
        if shutil.which(name, path=os.pathsep.join([ENVIRONMENT, os.environ["PATH"]])):
            continue
        if name not in PACKAGES:
            pytest.fail(f"needs {name} of the project's environment: run `make environment`", pytrace=False)
        if shutil.which("apt-get"):
            pytest.fail(f"needs {name}: run `make programs`", pytrace=False)
        pytest.skip(f"needs {name}, which comes from Debian's packages; this machine has no apt")
