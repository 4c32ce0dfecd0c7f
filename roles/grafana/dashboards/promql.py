"""The few shapes of PromQL that dashboards are made of. `selector` is what stands between the braces."""

import re

from roles.grafana.dashboards.builder import Query

# What the model service counts as http_requests_total for its routes that predict, whatever protocol a client speaks.
# PUT is for those of TorchServe.
PREDICTIONS = 'method=~"POST|PUT", path=~"/|.*predict|.*/infer|/predictions/.*"'


def rate(metric: str, selector: str = "", by: str = "") -> str:
    """The sum of the rates per second of a counter."""
    return f"sum{_by(by)}(rate({metric}{_braces(selector)}[$__rate_interval]))"


def mean(metric: str, selector: str = "", by: str = "") -> str:
    """The mean of a histogram's observations; nothing where there were none."""
    return f"{rate(f'{metric}_sum', selector, by)} / ({rate(f'{metric}_count', selector, by)} > 0)"


def quantile(level: float, metric: str, selector: str = "", by: str = "") -> str:
    """A quantile of a histogram's observations; nothing where there were none."""
    buckets = rate(f"{metric}_bucket", selector, f"{by}, le" if by else "le")
    return f"histogram_quantile({level}, {buckets}) >= 0"


def percentiles(metric: str, selector: str, by: str = "") -> list[Query]:
    """The median, the 95th and the 99th percentile, a line each and for each value of the label `by`."""
    prefix = f"{{{{{by}}}}} " if by else ""
    levels = (0.5, 0.95, 0.99)
    return [Query(quantile(level, metric, selector, by), f"{prefix}p{round(level * 100)}") for level in levels]


def share(metric: str, selector: str, bad: str, by: str = "") -> str:
    """The share of the series that `bad` selects besides: 0 where none of them was seen, nothing without traffic."""
    everything = rate(metric, selector, by)
    chosen = rate(metric, f"{selector}, {bad}" if selector else bad, by)
    return f"({chosen} or 0 * {everything}) / ({everything} > 0)"


def resolved(expression: str, interval: str = "1m") -> str:
    """The expression as Grafana would send it with every variable at All."""
    return re.sub(r'"\$[a-z]+"', '".*"', expression.replace("$__rate_interval", interval))


def _by(labels: str) -> str:
    return f" by ({labels}) " if labels else " "


def _braces(selector: str) -> str:
    return f"{{{selector}}}" if selector else ""
