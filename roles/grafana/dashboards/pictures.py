"""Draw the dashboards with the data of a running Prometheus, one SVG for each.

    python3 -m roles.grafana.dashboards.pictures http://127.0.0.1:9090 docs/images/dashboards

For documentation, and for a look at the data where there is no Grafana. It is no Grafana: it knows the panels that the
dashboards here use, every variable is at All, and the period ends now.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from roles.grafana.dashboards import drawing
from roles.grafana.dashboards.__main__ import DASHBOARDS
from roles.grafana.dashboards.drawing import Series
from roles.grafana.dashboards.promql import resolved

POINTS = 200
SHORTEST_STEP = 15


class Prometheus:
    """Answers of a Prometheus for the last `minutes`. Raises OSError where it doesn't answer or refuses a query."""

    def __init__(self, url: str, minutes: int) -> None:
        self.url = url.rstrip("/")
        self.end = int(time.time())
        self.start = self.end - 60 * minutes
        self.step = max(SHORTEST_STEP, 60 * minutes // POINTS)

    def series(self, target: dict[str, Any]) -> list[Series]:
        """What a panel's target shows, each series with its legend."""
        query = {"query": resolved(target["expr"], f"{max(60, 4 * self.step)}s")}
        if target.get("instant"):
            found = self._ask("query", query | {"time": str(self.end)})
        else:
            period = {"start": str(self.start), "end": str(self.end), "step": str(self.step)}
            found = self._ask("query_range", query | period)
        return [
            Series(
                legend(target.get("legendFormat", ""), one["metric"]),
                one["metric"],
                [(float(at), float(value)) for at, value in one.get("values") or [one["value"]]],
            )
            for one in found
        ]

    def marks(self, annotation: dict[str, Any]) -> list[float]:
        """When an annotation's events began, in seconds since the epoch."""
        found = self.series({"expr": annotation["expr"]})
        if annotation.get("useValueForTime"):
            moments = {value / 1000 for one in found for _, value in one.points}
        else:
            moments = {one.points[0][0] for one in found if one.points}
        return sorted(moment for moment in moments if self.start < moment < self.end)

    def _ask(self, kind: str, query: dict[str, str]) -> list[dict[str, Any]]:
        body = urllib.parse.urlencode(query).encode()
        # The address is the user's own, and no proxy knows it.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"{self.url}/api/v1/{kind}", body, timeout=60) as answer:
                return json.load(answer)["data"]["result"]
        except urllib.error.HTTPError as error:
            raise OSError(f"{query['query']}: {error.read().decode(errors='replace')}") from error


def legend(template: str, labels: dict[str, str]) -> str:
    """A series' name by Grafana's template, or from all its labels where there is none."""
    if template in ("", "__auto"):
        inner = ", ".join(f"{key}={value}" for key, value in sorted(labels.items()) if key != "__name__")
        return f"{labels.get('__name__', '')}{{{inner}}}" if inner else labels.get("__name__", "value")
    return re.sub(r"{{\s*(\w+)\s*}}", lambda found: labels.get(found[1], ""), template).strip()


def picture(dashboard: dict[str, Any], prometheus: Prometheus) -> str:
    """The dashboard as an SVG document."""
    marks = [
        (moment, annotation["iconColor"])
        for annotation in dashboard["annotations"]["list"]
        for moment in prometheus.marks(annotation)
    ]
    canvas = drawing.Canvas(dashboard, (prometheus.start, prometheus.end, prometheus.step), marks)
    for panel in dashboard["panels"]:
        found = [prometheus.series(target) for target in panel.get("targets", [])]
        canvas.panel(panel, [[one for one in series if not all_nan(one)] for series in found])
    return canvas.document()


def all_nan(series: Series) -> bool:
    return all(math.isnan(value) for _, value in series.points)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python3 -m roles.grafana.dashboards.pictures", description="Draw the dashboards with a Prometheus's data."
    )
    parser.add_argument("prometheus", metavar="URL", help="where Prometheus answers, as http://127.0.0.1:9090")
    parser.add_argument("directory", type=Path, help="where the pictures go: <uid>.svg")
    parser.add_argument("--minutes", type=int, default=60, help="how long before now they begin (default: 60)")
    parser.add_argument("--only", metavar="UID", help="draw this dashboard alone")
    options = parser.parse_args(arguments)
    chosen = [dashboard for dashboard in DASHBOARDS if options.only in (None, dashboard.uid)]
    if not chosen:
        parser.error(f"--only {options.only}: the dashboards are {', '.join(one.uid for one in DASHBOARDS)}")
    options.directory.mkdir(parents=True, exist_ok=True)
    prometheus = Prometheus(options.prometheus, options.minutes)
    for dashboard in chosen:
        path = options.directory / f"{dashboard.uid}.svg"
        try:
            path.write_text(picture(dashboard.model(), prometheus), encoding="utf-8")
        except OSError as error:
            print(f"{path} can't be drawn: {error}", file=sys.stderr)
            return 1
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
