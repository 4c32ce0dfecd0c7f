"""Prometheus metrics of several processes.

The counters live in memory-mapped files, one set for each role (``control``, ``worker-0`` …) and not for each process:
a replacement worker goes on where the dead one stopped. So counters never fall, and files never pile up.
"""

import bisect
import shutil
import sqlite3
import struct
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, values
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from model_server.bundle import Bundle
from model_server.config import Config
from model_server.features import reference_metrics
from model_server.jobs.store import Store
from model_server.state import SharedState

_MODEL_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
_REQUEST_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128)
_JOB_BUCKETS = (0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 300, 900, 3600)
_CONFIDENCE_BUCKETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1)
_MOST_CLASSES = 20
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
_USUAL_CODES = {
    ("POST", "/predict"): (200, 400, 413, 500, 503, 504),
    ("GET", "/health"): (200, 503),
    ("GET", "/metrics"): (200,),
}
REJECTIONS = ("invalid", "too_large", "unknown_model", "queue_full", "deadline", "abandoned")


class Metrics:
    """What the processes count. Make it once, in the parent, before any fork.

    ``directory`` must be empty and the value of PROMETHEUS_MULTIPROC_DIR since before prometheus_client was imported.
    """

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._role = "parent"
        values.ValueClass = values.MultiProcessValue(lambda: self._role)
        # Without a registry of their own: what is exported is read from the files.
        self.predictions = Counter("predictions", "Rows predicted, by outcome.", ["model", "status"], registry=None)
        self.prediction_duration = _histogram(
            "prediction_duration_seconds", "Time in the model, by batch.", _MODEL_BUCKETS
        )
        self.request_duration = _histogram(
            "model_request_duration_seconds", "From the whole request to the whole answer.", _REQUEST_BUCKETS
        )
        self.queue_wait = _histogram(
            "model_queue_wait_seconds", "Time that a request waits for the model.", _REQUEST_BUCKETS
        )
        self.handler_duration = _histogram(
            "model_handler_duration_seconds", "A request's time neither waiting nor in the model.", _MODEL_BUCKETS
        )
        self.batch_rows = _histogram("model_batch_rows", "Rows that the model got together.", _BATCH_BUCKETS)
        self.confidence = _histogram(
            "model_prediction_confidence", "Probability of the class that was predicted.", _CONFIDENCE_BUCKETS
        )
        self.predicted_classes = Counter(
            "model_predicted_class", "Rows by the class that was predicted.", ["model", "class"], registry=None
        )
        self.rejected = Counter(
            "model_rejected", "Requests without a prediction, by reason.", ["model", "reason"], registry=None
        )
        self.job_duration = _histogram(
            "model_job_duration_seconds", "Time that a job took once it was its turn.", _JOB_BUCKETS
        )
        self.jobs_finished = Counter("model_jobs_finished", "Jobs that ended, by outcome.", ["status"], registry=None)
        self.requests_in_progress = Gauge(
            "model_requests_in_progress",
            "Predictions that wait for the model or are in it.",
            ["model"],
            multiprocess_mode="livesum",
            registry=None,
        )
        self.queue_depth = Gauge(
            "model_queue_depth",
            "Requests that wait for the model.",
            ["model"],
            multiprocess_mode="livesum",
            registry=None,
        )
        self._requests = Counter("http_requests", "HTTP requests answered.", ["method", "path", "code"], registry=None)
        for (method, path), codes in _USUAL_CODES.items():
            for code in codes:
                self._requests.labels(method, path, str(code))
        self._models: dict[str, ModelMetrics] = {}
        self._children: dict[tuple[str, str, int], Any] = {}

    def of(self, model: str, labels: Sequence[str] = ()) -> "ModelMetrics":
        """The metrics of one model; ``labels`` are the classes that it tells apart, where it is a classifier."""
        if model not in self._models:
            self._models[model] = ModelMetrics(self, model, labels)
        return self._models[model]

    def become(self, role: str) -> None:
        """Count under ``role`` from now on. Called first thing after a fork; no two live processes share a role."""
        self._role = role
        # The files are changed at the next use of any value; better now than inside the first request.
        self.request_child("GET", "/health", 200).inc(0)

    def forget(self, role: str) -> None:
        """Drop the gauges of a dead process, and nothing else. Called by the parent before it forks a replacement."""
        mark_process_dead(role, self._directory)

    def count_request(self, method: str, path: str, code: int) -> None:
        """Count an answered request. ``path`` must be a known route or ``other``, never what a client sent."""
        self.request_child(method, path, code).inc()

    def request_child(self, method: str, path: str, code: int) -> Any:
        """The counter of requests with these labels."""
        key = (method, path, code)
        child = self._children.get(key)
        if child is None:
            child = self._requests.labels(method if method in _METHODS else "other", path, str(code))
            # Methods are the client's: the cache must not grow with them.
            if method in _METHODS:
                self._children[key] = child
        return child

    def remove_files(self) -> None:
        """Called by the parent when every other process has ended."""
        shutil.rmtree(self._directory, ignore_errors=True)


class ModelMetrics:
    """One model's metrics. ``batch`` and ``outputs`` may be called from any thread."""

    def __init__(self, metrics: Metrics, model: str, labels: Sequence[str] = ()) -> None:
        self.ok = metrics.predictions.labels(model, "ok")
        self.error = metrics.predictions.labels(model, "error")
        invalid, timeout = (metrics.predictions.labels(model, status) for status in ("invalid_input", "timeout"))
        # What the rows of a rejected request count as; those that were never looked at are in no one's count.
        self.refused = {"invalid": invalid, "too_large": invalid, "deadline": timeout}
        self.request_duration = metrics.request_duration.labels(model)
        self.queue_wait = metrics.queue_wait.labels(model)
        self.handler_duration = metrics.handler_duration.labels(model)
        self.rejected = {reason: metrics.rejected.labels(model, reason) for reason in REJECTIONS}
        self.in_progress = metrics.requests_in_progress.labels(model)
        self.queue_depth = metrics.queue_depth.labels(model)
        self._duration = metrics.prediction_duration.labels(model)
        self._batch_rows = metrics.batch_rows.labels(model)
        self._confidence = metrics.confidence.labels(model) if labels else None
        # A class of its own for the first ones, as many as dashboards can show.
        self._classes = {label: metrics.predicted_classes.labels(model, label) for label in labels[:_MOST_CLASSES]}
        self._other = metrics.predicted_classes.labels(model, "other") if len(labels) > _MOST_CLASSES else None

    def batch(self, rows: int, seconds: float) -> None:
        """Count one run of the model."""
        self._duration.observe(seconds)
        self._batch_rows.observe(rows)

    def outputs(self, values: list[Any]) -> None:
        """Count the classes among a request's outputs, where the model is a classifier."""
        if self._confidence is None:
            return
        for value in values:
            # A bundle's own postprocess may make something else of a row.
            match value:
                case {"class": str(label), "probability": float(probability)}:
                    child = self._classes.get(label, self._other)
                    if child is not None:
                        child.inc()
                    self._confidence.observe(probability)


class Tally:
    """Counts that are added to the metrics together, since one by one they would cost more than a small model.

    For one thread. ``flush`` uses what prometheus_client keeps to itself: a histogram's counters can't be raised by
    more than one observation otherwise.
    """

    def __init__(self) -> None:
        self._counts: dict[Any, float] = {}
        self._observations: dict[Any, list[float]] = {}

    def count(self, counter: Any, amount: float = 1) -> None:
        """Add to a counter's child."""
        self._counts[counter] = self._counts.get(counter, 0) + amount

    def observe(self, histogram: Any, value: float) -> None:
        """Add an observation to a histogram's child."""
        observed = self._observations.get(histogram)
        if observed is None:
            observed = self._observations[histogram] = []
        observed.append(value)

    def flush(self) -> None:
        """Make it visible to scrapes."""
        for counter, amount in self._counts.items():
            counter.inc(amount)
        self._counts.clear()
        for histogram, observed in self._observations.items():
            bounds, counts = histogram._upper_bounds, {}
            for value in observed:
                index = bisect.bisect_left(bounds, value)
                counts[index] = counts.get(index, 0) + 1
            histogram._sum.inc(sum(observed))
            for index, number in counts.items():
                histogram._buckets[index].inc(number)
        self._observations.clear()


def _histogram(name: str, text: str, buckets: Sequence[float]) -> Histogram:
    return Histogram(name, text, ["model"], buckets=buckets, registry=None)


class Exporter:
    """Collects what all processes counted, and what the shared state says; in the control process and in workers."""

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
        self._models = bundle.models
        self._colour = config.colour
        self._jobs = None if config.jobs is None else Store(config.jobs)

    def collect(self) -> Iterable[Metric]:
        workers = GaugeMetricFamily("model_workers", "Worker processes.", labels=["state"])
        workers.add_metric(["wanted"], self._state.wanted)
        workers.add_metric(["ready"], self._state.ready)
        restarts = CounterMetricFamily("model_worker_restarts", "Workers replaced.", value=self._state.restarts)
        return [*self._constant, workers, restarts, *self._load_metrics(), *self._job_metrics()]

    def _load_metrics(self) -> Iterable[Metric]:
        if self._state.loaded is None:
            return
        family = GaugeMetricFamily(
            "model_loaded_timestamp_seconds", "When the model was loaded.", labels=["model", "version"]
        )
        for model in self._models:
            family.add_metric([model.name, model.version], self._state.loaded)
        yield family

    def _job_metrics(self) -> Iterable[Metric]:
        if self._jobs is None:
            return
        family = GaugeMetricFamily("model_jobs", "Jobs of this colour.", labels=["status"])
        try:
            for status, number in self._jobs.counts(self._colour).items():
                family.add_metric([status], number)
        # All the other metrics matter the more then.
        except sqlite3.Error:
            return
        yield family


def _constant_metrics(config: Config, bundle: Bundle) -> Iterator[Metric]:
    # A gauge, since prometheus_client's Info vanishes with several processes.
    info = GaugeMetricFamily(
        "model_info",
        "What is served; always 1.",
        labels=["model", "version", "bundle", "bundle_version", "bundle_digest"],
    )
    accuracy = GaugeMetricFamily(
        "model_accuracy_ratio", "Accuracy measured by the training script, from 0 to 1.", labels=["model"]
    )
    samples = GaugeMetricFamily("model_accuracy_samples", "Rows that the accuracy was measured on.", labels=["model"])
    others = GaugeMetricFamily("model_training_metric", "Other metrics of the manifest.", labels=["model", "metric"])
    for model in bundle.models:
        info.add_metric([model.name, model.version, bundle.name, bundle.version, bundle.digest], 1)
        for name, value in model.metrics.items():
            if name == "accuracy":
                metric = "acc_" + model.name.replace("-", "_")
                yield GaugeMetricFamily(metric, "Accuracy measured by the training script.", value=value)
                # Some scripts measure in percent: that is no ratio.
                if 0 <= value <= 1:
                    accuracy.add_metric([model.name], value)
            elif name == "accuracy_samples":
                samples.add_metric([model.name], value)
            else:
                others.add_metric([model.name, name], value)
    yield info
    yield GaugeMetricFamily(
        "model_queue_limit", "Requests that may wait for one model in one worker.", value=config.queue_limit
    )
    yield from (family for family in (accuracy, samples, others) if family.samples)
    yield from reference_metrics(bundle.models)
