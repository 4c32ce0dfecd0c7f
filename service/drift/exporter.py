"""The statistics for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from drift.service import Service


class Collector:
    """Asked at each scrape, in a thread of its own."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        """All metrics; of a feature without a value, none."""
        connected = GaugeMetricFamily("training_connected", "Whether Kafka answers about every topic.")
        connected.add_metric([], self._service.is_connected)
        loaded = _gauge("training_reference_loaded", "Whether the live bundle brings the model's reference.")
        rows = CounterMetricFamily(
            "training_rows", "Messages by what they were.", labels=["model", "status", "reference"]
        )
        expired = CounterMetricFamily(
            "training_rows_expired", "Messages that Kafka removed before they were read.", labels=["model"]
        )
        last_expired = _gauge(
            "training_last_expired_timestamp_seconds", "When it was last noticed that messages had expired unread."
        )
        last = _gauge("training_last_message_timestamp_seconds", "Latest timestamp of a message.")
        lag = _gauge("training_consumer_lag", "Messages that aren't in the statistics yet.")
        count = _gauge("training_feature_count", "Values of a feature in the training rows.", "feature", "reference")
        mean = _gauge("training_feature_mean", "Their mean.", "feature", "reference")
        std = _gauge("training_feature_std", "Their standard deviation.", "feature", "reference")
        ratio = _gauge(
            "training_feature_bin_ratio", "Share of each bin of the bundle's reference.", "feature", "reference", "bin"
        )
        for published in self._service.published:
            model, state = published.model, published.state
            loaded.add_metric([model], published.reference is not None)
            if state is None:
                continue
            for status, number in state.rows.items():
                rows.add_metric([model, status, published.reference.digest], number)
            expired.add_metric([model], state.expired)
            if state.last_expired is not None:
                last_expired.add_metric([model], state.last_expired)
            if state.last_message is not None:
                last.add_metric([model], state.last_message)
            if published.lag is not None:
                lag.add_metric([model], published.lag)
            for feature, statistics in zip(published.reference.features, state.features, strict=True):
                if not statistics.count:
                    continue
                labels = [model, feature.name, published.reference.digest]
                count.add_metric(labels, statistics.count)
                mean.add_metric(labels, statistics.mean)
                std.add_metric(labels, statistics.std)
                for number, share in enumerate(statistics.ratios()):
                    ratio.add_metric([*labels, f"{number:02}"], share)
        yield from (connected, loaded, rows, expired, last_expired, last, lag, count, mean, std, ratio)


def _gauge(name: str, words: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, words, labels=["model", *labels])
