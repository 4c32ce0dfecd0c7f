"""Dashboards as Grafana 11 writes them (schema version 41), from rows of panels.

A panel says what it shows; its place, its id and all that Grafana wants besides are filled in here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

# The uid is what roles/grafana provisions.
SOURCE = {"type": "prometheus", "uid": "prometheus"}
SCHEMA_VERSION = 41
PLUGIN_VERSION = "11.6.0"
COLUMNS = 24
# Of a panel, in Grafana's rows; a stat is half as tall unless it says otherwise.
HEIGHT = 8

Steps = Sequence[tuple[float | None, str]]
GOOD_IS_ONE: Steps = ((None, "red"), (1, "green"))
GOOD_IS_ZERO: Steps = ((None, "green"), (1, "red"))
# Lines of a colour have that colour, wherever they are.
_COLOURS = {"blue": "blue", "green": "green"}


@dataclass(frozen=True)
class Query:
    """A PromQL expression. `instant` asks for the present only, `table` for labels as columns (and is instant)."""

    expression: str
    legend: str = ""
    instant: bool = False
    table: bool = False
    heatmap: bool = False

    def model(self, letter: str) -> dict[str, Any]:
        instant = self.instant or self.table
        return {
            "refId": letter,
            "datasource": SOURCE,
            "expr": self.expression,
            "legendFormat": self.legend or "__auto",
            "format": "table" if self.table else "heatmap" if self.heatmap else "time_series",
            "editorMode": "code",
            "range": not instant,
            "instant": instant,
        }


@dataclass(frozen=True)
class Panel:
    """A panel without its place. `unit` is Grafana's name of a unit."""

    kind: str
    title: str
    description: str
    unit: str
    queries: tuple[Query, ...]
    width: int
    height: int
    defaults: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    overrides: list[dict[str, Any]] = field(default_factory=list)
    transformations: list[dict[str, Any]] = field(default_factory=list)

    def model(self, number: int, x: int, y: int) -> dict[str, Any]:
        return {
            "id": number,
            "type": self.kind,
            "title": self.title,
            "description": self.description,
            "datasource": SOURCE,
            "gridPos": {"h": self.height, "w": self.width, "x": x, "y": y},
            "fieldConfig": {"defaults": {"unit": self.unit, **self.defaults}, "overrides": self.overrides},
            "options": self.options,
            "pluginVersion": PLUGIN_VERSION,
            "targets": [query.model(chr(ord("A") + index)) for index, query in enumerate(self.queries)],
            "transformations": self.transformations,
        }


@dataclass(frozen=True)
class Row:
    """A heading and the panels below it, which fill the width from left to right."""

    title: str
    panels: Sequence[Panel]


@dataclass(frozen=True)
class Variable:
    """A choice at the top of a dashboard: the values of a label, none or several of them, or all."""

    name: str
    label: str
    metric: str

    def model(self) -> dict[str, Any]:
        query = f"label_values({self.metric}, {self.name})"
        return {
            "name": self.name,
            "label": self.label,
            "type": "query",
            "datasource": SOURCE,
            "definition": query,
            "query": {"qryType": 1, "query": query, "refId": "PrometheusVariableQueryEditor-VariableQuery"},
            "refresh": 2,
            "sort": 1,
            "multi": True,
            "includeAll": True,
            "allValue": ".*",
            "current": {"text": ["All"], "value": ["$__all"]},
            "options": [],
            "regex": "",
            "hide": 0,
            "skipUrlSync": False,
        }


@dataclass(frozen=True)
class Dashboard:
    """A dashboard; its file is named after the uid."""

    uid: str
    title: str
    description: str
    rows: Sequence[Row]
    variables: Sequence[Variable] = ()
    refresh: str = "10s"
    period: str = "1h"

    def model(self) -> dict[str, Any]:
        return {
            "id": None,
            "uid": self.uid,
            "title": self.title,
            "description": self.description,
            "tags": ["appliance"],
            "schemaVersion": SCHEMA_VERSION,
            "version": 1,
            "editable": False,
            "graphTooltip": 1,
            "timezone": "browser",
            "refresh": self.refresh,
            "weekStart": "",
            "time": {"from": f"now-{self.period}", "to": "now"},
            "timepicker": {},
            "fiscalYearStartMonth": 0,
            "links": [_LINK_TO_THE_OTHERS],
            "templating": {"list": [variable.model() for variable in self.variables]},
            "annotations": {"list": [annotation.copy() for annotation in _ANNOTATIONS]},
            "panels": list(_placed(self.rows)),
        }


def _placed(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    number = top = 0
    for row in rows:
        number += 1
        yield {
            "id": number,
            "type": "row",
            "title": row.title,
            "collapsed": False,
            "gridPos": {"h": 1, "w": COLUMNS, "x": 0, "y": top},
            "panels": [],
        }
        left, top, height = 0, top + 1, 0
        for panel in row.panels:
            if left + panel.width > COLUMNS:
                left, top, height = 0, top + height, 0
            number += 1
            yield panel.model(number, left, top)
            left, height = left + panel.width, max(height, panel.height)
        top += height


_LINK_TO_THE_OTHERS = {
    "type": "dashboards",
    "title": "Appliance",
    "tags": ["appliance"],
    "asDropdown": False,
    "keepTime": True,
    "includeVars": False,
    "targetBlank": False,
    "icon": "external link",
    "tooltip": "",
    "url": "",
}


def _annotation(name: str, colour: str, expression: str, title: str, text: str = "", **more: Any) -> dict[str, Any]:
    return {
        "name": name,
        "datasource": SOURCE,
        "enable": True,
        "hide": False,
        "iconColor": colour,
        "expr": expression,
        "titleFormat": title,
        "textFormat": text,
        "step": "15s",
        **more,
    }


# Nothing counts as new in the first minute of a host's metrics: they would all be.
_KNOWN_FOR_A_MINUTE = 'and on (instance) appliance_rollbacks_total{reason="by hand"} offset 1m'
_ANNOTATIONS = (
    _annotation(
        "Alerts that page",
        "red",
        'ALERTS{alertstate="firing", severity="page"}',
        "{{alertname}}",
    ),
    _annotation(
        "Switches",
        "blue",
        "1000 * appliance_last_switch_timestamp_seconds"
        ' * on (instance) group_right() appliance_release_info{role="live"}',
        "{{colour}} live",
        "{{model}} {{version}}, release {{release}}",
        useValueForTime=True,
    ),
    _annotation(
        "Rollbacks",
        "orange",
        "(appliance_rollbacks_total - (appliance_rollbacks_total offset 1m or 0 * appliance_rollbacks_total)) > 0 "
        + _KNOWN_FOR_A_MINUTE,
        "Back to the earlier release",
        "{{reason}}",
    ),
    _annotation(
        "Releases",
        "purple",
        "(appliance_release_info unless on (instance, colour, release) appliance_release_info offset 1m) "
        + _KNOWN_FOR_A_MINUTE,
        "Release {{release}} on {{colour}}",
        "{{model}} {{version}}",
    ),
)


def timeseries(
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    width: int = 8,
    minimum: float | None = 0,
    maximum: float | None = None,
    stacked: bool = False,
    limit: float | None = None,
) -> Panel:
    """Lines over time. `limit` draws a line at that value."""
    custom: dict[str, Any] = {
        "drawStyle": "line",
        "lineWidth": 1,
        "fillOpacity": 40 if stacked else 8,
        "showPoints": "auto",
        "spanNulls": False,
        "stacking": {"mode": "normal" if stacked else "none", "group": "A"},
    }
    defaults: dict[str, Any] = {"custom": custom}
    if minimum is not None:
        defaults["min"] = minimum
    if maximum is not None:
        defaults["max"] = maximum
    if limit is not None:
        defaults["thresholds"] = _thresholds([(None, "transparent"), (limit, "red")])
        custom["thresholdsStyle"] = {"mode": "dashed"}
    options = {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    overrides = [
        {
            "matcher": {"id": "byRegexp", "options": f"/^{name}\\b/"},
            "properties": [{"id": "color", "value": {"mode": "shades", "fixedColor": colour}}],
        }
        for name, colour in _COLOURS.items()
        if any(query.legend.startswith("{{colour}}") for query in queries)
    ]
    return Panel("timeseries", title, description, unit, queries, width, HEIGHT, defaults, options, overrides)


def stat(
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    width: int = 4,
    height: int = HEIGHT // 2,
    steps: Steps | None = None,
    words: dict[int, tuple[str, str]] | None = None,
    text: str = "auto",
    decimals: int | None = None,
) -> Panel:
    """The present value, large. `words` shows a value as a word in a colour; `text` is Grafana's textMode."""
    defaults: dict[str, Any] = {"thresholds": _thresholds(steps or [(None, "text")])}
    if words:
        shown = {str(value): {"text": word, "color": colour, "index": value} for value, (word, colour) in words.items()}
        defaults["mappings"] = [{"type": "value", "options": shown}]
    if decimals is not None:
        defaults["decimals"] = decimals
    options = {
        "colorMode": "value",
        "graphMode": "none",
        "justifyMode": "auto",
        "orientation": "auto",
        "textMode": text,
        "wideLayout": True,
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
    }
    present = tuple(replace(query, instant=True) for query in queries)
    return Panel("stat", title, description, unit, present, width, height, defaults, options)


def bars(
    title: str,
    description: str,
    unit: str,
    *queries: Query,
    width: int = 8,
) -> Panel:
    """The present value of each series as a bar."""
    defaults = {"min": 0, "thresholds": _thresholds([(None, "blue")])}
    options = {
        "displayMode": "basic",
        "orientation": "horizontal",
        "valueMode": "color",
        "showUnfilled": True,
        "minVizHeight": 10,
        "minVizWidth": 0,
        "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
    }
    present = tuple(replace(query, instant=True) for query in queries)
    return Panel("bargauge", title, description, unit, present, width, HEIGHT, defaults, options)


def heatmap(title: str, description: str, unit: str, query: Query, *, width: int = 8) -> Panel:
    """A histogram's buckets over time; `query` keeps the label le."""
    options = {
        "calculate": False,
        "cellGap": 1,
        "color": {"mode": "scheme", "scheme": "Oranges", "exponent": 0.5, "steps": 64, "fill": "dark-orange"},
        "filterValues": {"le": 1e-9},
        "legend": {"show": True},
        "rowsFrame": {"layout": "auto"},
        "tooltip": {"mode": "single", "yHistogram": False, "showColorScale": True},
        "yAxis": {"axisPlacement": "left", "reverse": False, "unit": unit},
    }
    buckets = replace(query, legend="{{le}}", heatmap=True)
    return Panel("heatmap", title, description, unit, (buckets,), width, HEIGHT, {}, options)


def timeline(
    title: str,
    description: str,
    query: Query,
    *,
    words: dict[int, tuple[str, str]],
    width: int = 8,
) -> Panel:
    """States over time, each a word in a colour."""
    shown = {str(value): {"text": word, "color": colour, "index": value} for value, (word, colour) in words.items()}
    defaults = {
        "custom": {"fillOpacity": 70, "lineWidth": 0, "spanNulls": False},
        "mappings": [{"type": "value", "options": shown}],
    }
    options = {
        "mergeValues": True,
        "showValue": "auto",
        "alignValue": "left",
        "rowHeight": 0.9,
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "single", "sort": "none"},
    }
    return Panel("state-timeline", title, description, "none", (query,), width, HEIGHT, defaults, options)


@dataclass(frozen=True)
class Column:
    """A column of a table: a query's value, its heading, its unit, and where it changes its colour."""

    query: Query
    title: str
    unit: str = "short"
    steps: Steps | None = None
    decimals: int | None = None


def table(
    title: str,
    description: str,
    labels: Sequence[str],
    *columns: Column,
    width: int = 12,
) -> Panel:
    """A line for each set of `labels`, which every query has to have, with a column for each query."""
    letters = [chr(ord("A") + index) for index in range(len(columns))]
    # One query's value column is called Value, those of several Value #A, Value #B and so on.
    values = [f"Value #{letter}" for letter in letters] if len(columns) > 1 else ["Value"]
    overrides = [_column_override(column) for column in columns]
    transformations = [
        *([{"id": "merge", "options": {}}] if len(columns) > 1 else []),
        {"id": "filterFieldsByName", "options": {"include": {"names": [*labels, *values]}}},
        {
            "id": "organize",
            "options": {
                "excludeByName": {},
                "indexByName": {name: index for index, name in enumerate([*labels, *values])},
                "renameByName": {value: column.title for value, column in zip(values, columns, strict=True)},
            },
        },
    ]
    defaults = {"custom": {"align": "auto", "cellOptions": {"type": "auto"}, "inspect": False, "filterable": True}}
    options = {"showHeader": True, "cellHeight": "sm", "footer": {"show": False, "reducer": ["sum"], "fields": ""}}
    queries = tuple(replace(column.query, table=True) for column in columns)
    unit = columns[0].unit
    return Panel(
        "table", title, description, unit, queries, width, HEIGHT, defaults, options, overrides, transformations
    )


def _column_override(column: Column) -> dict[str, Any]:
    properties: list[dict[str, Any]] = [{"id": "unit", "value": column.unit}]
    if column.decimals is not None:
        properties.append({"id": "decimals", "value": column.decimals})
    if column.steps:
        properties.append({"id": "thresholds", "value": _thresholds(column.steps)})
        properties.append({"id": "custom.cellOptions", "value": {"type": "color-text"}})
    return {"matcher": {"id": "byName", "options": column.title}, "properties": properties}


def _thresholds(steps: Steps) -> dict[str, Any]:
    return {"mode": "absolute", "steps": [{"value": value, "color": colour} for value, colour in steps]}
