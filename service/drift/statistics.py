"""Count, mean, variance and bins of a feature, kept while values arrive."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass
class FeatureStatistics:
    """`m2` is the sum of the squared distances from the mean; `bins` counts values by the reference's edges, if any."""

    count: int = 0
    mean: float = 0.0
    m2: float = 0.0
    bins: list[int] = field(default_factory=list)

    def add(self, values: Sequence[float], edges: Sequence[float]) -> None:
        """Take in values, all finite: the two sets' moments are combined as Chan, Golub and LeVeque showed."""
        if not values:
            return
        added = len(values)
        total = self.count + added
        # Rounded, the mean of equal values is another number than they are, and a constant would seem to vary.
        mean = values[0] if min(values) == max(values) else math.fsum(values) / added
        m2 = math.fsum((value - mean) ** 2 for value in values)
        distance = mean - self.mean
        self.mean = self.mean + distance * added / total if self.count else mean
        self.m2 += m2 + distance**2 * self.count * added / total
        self.count = total
        for value in values if edges else ():
            self.bins[bisect.bisect_right(edges, value)] += 1

    @property
    def std(self) -> float:
        """The sample's standard deviation; 0 for fewer than two values."""
        found = math.sqrt(self.m2 / (self.count - 1)) if self.count > 1 else 0.0
        # A state that was kept by an earlier version may hold what rounding left of a constant.
        return found if found > 1e-13 * abs(self.mean) else 0.0

    def ratios(self) -> list[float]:
        """The share of each bin. Half a value more in each keeps every logarithm of a share finite."""
        total = self.count + 0.5 * len(self.bins)
        return [(count + 0.5) / total for count in self.bins]
