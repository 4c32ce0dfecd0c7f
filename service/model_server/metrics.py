"""Prometheus metrics of several processes.

The counters live in memory-mapped files, one set for each role (``control``, ``worker-0`` …) and not for each process:
a replacement worker goes on where the dead one stopped. So counters never fall, and files never pile up.
"""

import shutil
import struct
import time
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, values
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from model_server.bundle import Bundle
from model_server.config import Config
from model_server.state import SharedState

_DURATION_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
_USUAL_CODES = {
    ("POST", "/predict"): (200, 400, 413, 500, 503),
    ("GET", "/health"): (200, 503),
    ("GET", "/metrics"): (200,),
}


class Metrics:
    """What the processes count. Make it once, in the parent, before any fork.

    ``directory`` must be empty and the value of PROMETHEUS_MULTIPROC_DIR since before prometheus_client was imported.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._role = "parent"
        values.ValueClass = values.MultiProcessValue(lambda: self._role)
        # Without a registry of their own: what is exported is read from the files.
        self._predictions = Counter("predictions", "Rows predicted, by outcome.", ["status"], registry=None)
        self.prediction_ok = self._predictions.labels("ok")
        self.prediction_error = self._predictions.labels("error")
        self.prediction_duration = Histogram(
            "prediction_duration_seconds", "Time in the model.", buckets=_DURATION_BUCKETS, registry=None
        )
        self.requests_in_progress = Gauge(
            "model_requests_in_progress",
            "Predictions that wait for the model or are in it.",
            multiprocess_mode="livesum",
            registry=None,
        )
        self._requests = Counter("http_requests", "HTTP requests answered.", ["method", "path", "code"], registry=None)
        for (method, path), codes in _USUAL_CODES.items():
            for code in codes:
                self._requests.labels(method, path, str(code))

    def become(self, role: str) -> None:
        """Count under ``role`` from now on. Called first thing after a fork; no two live processes share a role."""
        self._role = role
        # The files are changed at the next use of any value; better now than inside the first request.
        self.requests_in_progress.inc(0)

    def forget(self, role: str) -> None:
        """Drop the gauges of a dead process, and nothing else. Called by the parent before it forks a replacement."""
        mark_process_dead(role, self._directory)

    def count_request(self, method: str, path: str, code: int) -> None:
        """Count an answered request. ``path`` must be a known route or ``other``, never what a client sent."""
        self._requests.labels(method if method in _METHODS else "other", path, str(code)).inc()

    def remove_files(self) -> None:
        """Called by the parent when every other process has ended."""
        shutil.rmtree(self._directory, ignore_errors=True)


class Exporter:
    """Collects what all processes counted, and what the shared state says. Used by the control process."""

    def __init__(self, directory: str, config: Config, bundle: Bundle, state: SharedState) -> None:
        self._registry = CollectorRegistry()
        MultiProcessCollector(self._registry, directory)
        self._registry.register(_Facts(config, bundle, state))

    def text(self) -> bytes:
        """The Prometheus text format, version 0.0.4."""
        # A file that a replacement is just making is empty for an instant.
        for _ in range(2):
            try:
                return generate_latest(self._registry)
            except struct.error:
                time.sleep(0.02)
        return generate_latest(self._registry)


class _Facts:
    def __init__(self, config: Config, bundle: Bundle, state: SharedState) -> None:
        self._state = state
        self._constant = list(_constant_metrics(config, bundle))

    def collect(self) -> Iterable[Metric]:
        workers = GaugeMetricFamily("model_workers", "Worker processes.", labels=["state"])
        workers.add_metric(["wanted"], self._state.wanted)
        workers.add_metric(["ready"], self._state.ready)
        restarts = CounterMetricFamily("model_worker_restarts", "Workers replaced.", value=self._state.restarts)
        return [*self._constant, workers, restarts]


def _constant_metrics(config: Config, bundle: Bundle) -> Iterator[Metric]:
    # A gauge, since prometheus_client's Info vanishes with several processes.
    info = GaugeMetricFamily("model_info", "What is served; always 1.", labels=["model", "version", "bundle_digest"])
    info.add_metric([bundle.name, bundle.version, bundle.digest], 1)
    yield info
    yield GaugeMetricFamily("model_queue_limit", "Predictions that may wait in one worker.", value=config.queue_limit)
    others = GaugeMetricFamily("model_training_metric", "Other metrics of the manifest.", labels=["metric"])
    for name, value in bundle.metrics.items():
        if name == "accuracy":
            metric = "acc_" + bundle.name.replace("-", "_")
            yield GaugeMetricFamily(metric, "Accuracy measured by the training script.", value=value)
        else:
            others.add_metric([name], value)
    if others.samples:
        yield others
