"""``python -m model_server``.

Exit status 0 after SIGTERM, 78 where the bundle or a setting can't be used, 1 after any other failure.
"""

import json
import os
import tempfile
from pathlib import Path

from model_server.bundle import BundleError, read
from model_server.config import Config, ConfigError
from model_server.logs import Log, capture_library_logs

_REJECTED = os.EX_CONFIG


def main() -> int:
    """Run the container's processes; the exit status."""
    log = Log(colour=os.environ.get("MODEL_COLOUR") or "none", release=os.environ.get("MODEL_RELEASE") or "")
    log = log.bind(model=None, version=None)
    try:
        config = Config.from_environment(os.environ)
    except ConfigError as error:
        log.error("configuration_rejected", str(error))
        return _REJECTED
    log = log.quoting(config.log_error_messages)
    metrics_directory = tempfile.mkdtemp(prefix="model-metrics-")
    _prepare_libraries(metrics_directory)
    # Only now, since prometheus_client looks for its directory when it is imported.
    from model_server.metrics import Metrics
    from model_server.supervisor import Supervisor, remove_stale_sockets

    metrics = Metrics(metrics_directory)
    try:
        remove_stale_sockets(config.socket_dir)
        bundle = read(config.bundle_dir)
        log = log.bind(model=bundle.name, version=bundle.version)
        capture_library_logs(log)
        Supervisor(config, bundle, metrics, metrics_directory, log).run()
    except ConfigError as error:
        log.error("configuration_rejected", str(error))
        return _REJECTED
    except BundleError as error:
        _reject(config, log, error)
        return _REJECTED
    except OSError as error:
        # In full: it's about this machine, and quotes no client.
        log.error("failed", f"the service ended unexpectedly: {error}", error)
        return 1
    except Exception as error:
        log.error("failed", "the service ended unexpectedly", error)
        return 1
    finally:
        metrics.remove_files()
    return 0


def _prepare_libraries(metrics_directory: str) -> None:
    """Set what libraries read from the environment when they are imported."""
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = metrics_directory
    # A thread pool of OpenMP in the parent would hang every forked worker.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["MKL_NUM_THREADS"] = "1"


def _reject(config: Config, log: Log, error: BundleError) -> None:
    log.error("bundle_rejected", str(error), error.__cause__)
    try:
        _write_atomically(config.startup_error_file, json.dumps({"reason": str(error)}) + "\n")
    except OSError as failure:
        log.warning("startup_error_not_written", f"{config.startup_error_file}: {failure.strerror}")


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.rename(path)


if __name__ == "__main__":
    # Not sys.exit: taking PyTorch apart in order needs a second and is of no use to anybody.
    os._exit(main())
