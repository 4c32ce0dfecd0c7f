"""`python -m drift --config FILE`: the service in the foreground, until SIGTERM."""

from __future__ import annotations

import argparse
import fcntl
import logging
import signal
import sys
import threading
from pathlib import Path
from typing import IO

from prometheus_client import CollectorRegistry, start_http_server

from drift import config
from drift.errors import DriftError
from drift.exporter import Collector
from drift.service import Service


def main() -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(prog="python -m drift", description=__doc__)
    parser.add_argument("--config", type=Path, default=config.DEFAULT_PATH, help="default: %(default)s")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        _run(config.read(arguments.config), stop)
    except DriftError as error:
        print(f"drift: {error}", file=sys.stderr)
        return 1
    return 0


def _run(settings: config.Config, stop: threading.Event) -> None:
    with _lock(settings.state_dir):
        service = Service(settings)
        registry = CollectorRegistry(auto_describe=False)
        registry.register(Collector(service))
        host, port = settings.listen
        try:
            start_http_server(port, host, registry)
        except OSError as error:
            raise DriftError(f"listen_address {settings.listen_address} can't be used: {error.strerror}") from None
        service.run(stop)


def _lock(directory: Path) -> IO[bytes]:
    """The lock of a state directory: two services in one would count twice. Raises DriftError."""
    try:
        file = open(directory / "lock", "wb")  # noqa: SIM115 - closed by the caller
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DriftError(f"another service uses {directory}: stop it first") from None
    except OSError as error:
        raise DriftError(f"state_dir {directory} can't be used: {error.strerror}") from None
    return file


if __name__ == "__main__":
    sys.exit(main())
