"""What models are asked about, feature by feature, counted against the rows that they were trained on.

Only counters come out of it, which Prometheus makes windows of: sums of deviations and a histogram with the training
rows' bins. They are kept in the process and added to the metrics once a second, since that costs more than a small
model's prediction.
"""

import array
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

from prometheus_client import Counter
from prometheus_client.core import GaugeMetricFamily, Metric

from model_server.bundle import Bundle
from model_server.reference import BINS, Reference

_LABELS = ("model", "feature", "reference")
_FOLD_SECONDS = 1.0
# So many values are added up in a fraction of a millisecond, during which the worker answers nobody.
_MOST_HELD = 4096
# In units of `scale`: one absurd value must not outweigh all others. It's counted as out of range as well.
_LARGEST_DEVIATION = 1000.0
# How Python and PyTorch keep numbers of each type, so that they're compared as the model gets them.
_STORED = {
    "float32": ("f", "float32"),
    "float64": ("d", "float64"),
    "int32": ("i", "int32"),
    "int64": ("q", "int64"),
    "bool": ("b", "int8"),
}


def reference_metrics(models: Sequence[Bundle]) -> Iterator[Metric]:
    """The references of the bundles that have one."""
    families = {
        name: GaugeMetricFamily(f"model_feature_{name}", text, labels=_LABELS)
        for name, text in (
            ("center", "What deviations of live values are counted from."),
            ("scale", "The unit of their deviations."),
            ("reference_mean", "Mean of the training values."),
            ("reference_std", "Standard deviation of the training values."),
            ("reference_count", "Training rows."),
        )
    }
    ratios = GaugeMetricFamily(
        "model_feature_reference_bin_ratio", "Share of the training values in a bin.", labels=(*_LABELS, "bin")
    )
    for model in models:
        if model.reference is None:
            continue
        for feature in model.reference.features:
            labels = [model.name, feature.name, model.reference.digest]
            families["center"].add_metric(labels, feature.center)
            families["scale"].add_metric(labels, feature.scale)
            families["reference_mean"].add_metric(labels, feature.mean)
            families["reference_std"].add_metric(labels, feature.std)
            families["reference_count"].add_metric(labels, model.reference.count)
            for index, ratio in enumerate(feature.ratios):
                ratios.add_metric([*labels, _bin(index)], ratio)
    yield from (family for family in (*families.values(), ratios) if family.samples)


class FeatureCounts:
    """Counts the live rows of one model, whose numbers are of ``dtype``. For one thread."""

    def __init__(self, counters: "FeatureCounters", model: str, dtype: str, reference: Reference) -> None:
        import torch

        features = reference.features
        self._typecode, stored = _STORED[dtype]
        self._dtype = getattr(torch, stored)
        self._columns = len(features)
        # Not the rows themselves, which the garbage collector would then look after.
        self._numbers = array.array(self._typecode)
        self._tensors: list[Any] = []

        def tensor(values: list[Any]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float64)

        self._center = tensor([feature.center for feature in features])
        self._scale = tensor([feature.scale for feature in features])
        self._minimum = tensor([feature.minimum for feature in features])
        self._maximum = tensor([feature.maximum for feature in features])
        # Where there are fewer bins, nothing reaches the others.
        padding = [math.inf] * (BINS - 1)
        self._edges = tensor([[*feature.edges, *padding][: BINS - 1] for feature in features])
        self._first_bin = torch.arange(self._columns)[:, None] * BINS
        labels = [(model, feature.name, reference.digest) for feature in features]
        counted, self._missing, self._invalid, *sums = (
            [counter.labels(*each) for each in labels] for counter in counters.by_feature
        )
        bins = [
            counters.bins.labels(*each, _bin(index)) if index < len(feature.ratios) else None
            for each, feature in zip(labels, features, strict=True)
            for index in range(BINS)
        ]
        # In the order in which values are added up.
        self._children = [*counted, *itertools.chain.from_iterable(sums), *bins]
        self._totals = torch.zeros(len(self._children), dtype=torch.float64)

    def add(self, rows: Sequence[Any]) -> None:
        """Count checked rows: lists of numbers, or a tensor of shape [rows, features]."""
        if isinstance(rows, list):
            for row in rows:
                self._numbers.fromlist(row)
            if len(self._numbers) >= _MOST_HELD:
                self._add_up()
        else:
            self._tensors.append(rows)
            if sum(map(len, self._tensors)) * self._columns >= _MOST_HELD:
                self._add_up()

    def refuse(self, column: int, is_missing: bool) -> None:
        """Count a request that was refused for a value in ``column``."""
        (self._missing if is_missing else self._invalid)[column].inc()

    def fold(self) -> None:
        """Make what was added visible to scrapes."""
        self._add_up()
        for child, amount in zip(self._children, self._totals.tolist(), strict=True):
            if amount and child is not None:
                child.inc(amount)
        self._totals.zero_()

    def _add_up(self) -> None:
        if not self._numbers and not self._tensors:
            return
        import torch

        values = self._take()
        deviations = ((values - self._center) / self._scale).clamp_(-_LARGEST_DEVIATION, _LARGEST_DEVIATION)
        outside = (values < self._minimum) | (values > self._maximum)
        bins = torch.searchsorted(self._edges, values.T.contiguous(), right=True) + self._first_bin
        self._totals += torch.cat(
            [
                torch.full((self._columns,), len(values)),
                outside.sum(0),
                deviations.clamp(min=0).sum(0),
                (-deviations).clamp(min=0).sum(0),
                deviations.square().sum(0),
                torch.bincount(bins.flatten(), minlength=self._columns * BINS),
            ]
        )

    def _take(self) -> Any:
        """All values that are held, as float64 of shape [rows, features]."""
        import torch

        parts = self._tensors
        if self._numbers:
            parts = [torch.frombuffer(self._numbers, dtype=self._dtype).view(-1, self._columns), *parts]
        # New ones: the tensor shares the old one's memory.
        self._numbers, self._tensors = array.array(self._typecode), []
        return torch.cat([part.double() for part in parts])


class Features:
    """Counts the live rows of the models that have a reference. To be made after the fork; for one thread."""

    def __init__(self, models: Sequence[Bundle]) -> None:
        counters = FeatureCounters()
        self._counts = {
            model.name: FeatureCounts(counters, model.name, model.input.dtype, model.reference)
            for model in models
            if model.reference is not None
        }
        self._due = 0.0

    def of(self, model: str) -> FeatureCounts | None:
        """The counts of the model of that name, where it has a reference."""
        return self._counts.get(model)

    def turn(self) -> None:
        """Make counts visible where that is due. To be called every few seconds at least."""
        if self._counts and (now := time.monotonic()) >= self._due:
            self._due = now + _FOLD_SECONDS
            self.fold()

    def fold(self) -> None:
        """Make all counts visible to scrapes."""
        for counts in self._counts.values():
            counts.fold()


class FeatureCounters:
    """The counters: one set for all models of a process."""

    def __init__(self) -> None:
        self.by_feature = [
            Counter(f"model_feature_{name}", text, _LABELS, registry=None)
            for name, text in (
                ("rows", "Rows predicted."),
                ("missing", "Requests refused because the feature's value was null."),
                ("invalid", "Requests refused because the feature's value was of the wrong type or too large."),
                ("out_of_range", "Rows with a value beyond those of the training rows."),
                ("deviation_positive", "Sum of the deviations above the center, in units of the scale."),
                ("deviation_negative", "Sum of the deviations below the center, in units of the scale."),
                ("deviation_squared", "Sum of the squared deviations, in units of the scale."),
            )
        ]
        self.bins = Counter(
            "model_feature_bin", "Rows by the bin of the feature's value.", (*_LABELS, "bin"), registry=None
        )


def _bin(index: int) -> str:
    return f"{index:02}"
