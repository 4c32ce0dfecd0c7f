"""The dashboards that the role grafana ships: what can be said about them without a Grafana.

Whether each expression parses is checked where promtool is: on a provisioned host (molecule/grafana/tests).
"""

import itertools
import json
import re
from pathlib import Path

import pytest

ROLE = Path(__file__).resolve().parents[2] / "roles/grafana"
DASHBOARDS = sorted((ROLE / "files/dashboards").glob("*.json"))
PANEL_TYPES = {"timeseries", "stat", "gauge", "bargauge", "table", "heatmap", "state-timeline", "text", "row"}
DATASOURCE = {"type": "prometheus", "uid": "prometheus"}
# Metrics with a name of their own; every other metric of the model service starts with model_ (docs/contracts.md).
OWN_NAMES = {"predictions_total", "prediction_duration_seconds_bucket", "http_requests_total", "up", "ALERTS"}


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def data_panels(dashboard):
    return [panel for panel in dashboard["panels"] if panel["type"] not in ("row", "text")]


def expressions(dashboard):
    targets = [target for panel in data_panels(dashboard) for target in panel["targets"]]
    return [entry["expr"] for entry in targets + dashboard["annotations"]["list"]]


@pytest.fixture(params=DASHBOARDS, ids=lambda path: path.stem)
def dashboard(request):
    return load(request.param)


def test_there_are_dashboards():
    assert DASHBOARDS


def test_file_is_named_after_the_uid():
    assert [load(path)["uid"] for path in DASHBOARDS] == [path.stem for path in DASHBOARDS]


def test_uids_and_titles_are_unique():
    models = [load(path) for path in DASHBOARDS]
    assert len({model["uid"] for model in models}) == len(models)
    assert len({model["title"] for model in models}) == len(models)


def test_dashboard_is_a_raw_model(dashboard):
    assert re.fullmatch(r"[a-z0-9-]{1,40}", dashboard["uid"])
    assert dashboard["id"] is None
    assert 39 <= dashboard["schemaVersion"] <= 41
    assert dashboard["description"]
    assert not {"__inputs", "__requires", "__elements"} & set(dashboard)


def test_panel_ids_and_titles_are_unique(dashboard):
    for key in ("id", "title"):
        values = [panel[key] for panel in dashboard["panels"]]
        assert len(set(values)) == len(values), key


def test_panels_are_explained(dashboard):
    for panel in data_panels(dashboard):
        assert panel["type"] in PANEL_TYPES, panel["title"]
        assert panel["title"]
        assert len(panel["description"]) > 20, panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]


def test_panels_ask_the_provisioned_data_source(dashboard):
    assert all(entry["datasource"] == DATASOURCE for entry in dashboard["annotations"]["list"])
    for panel in data_panels(dashboard):
        assert panel["datasource"] == DATASOURCE, panel["title"]
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            assert target["datasource"] == DATASOURCE, panel["title"]
            assert target["expr"].strip(), panel["title"]


def test_targets_of_a_panel_have_their_own_letters(dashboard):
    for panel in data_panels(dashboard):
        letters = [target["refId"] for target in panel["targets"]]
        assert len(set(letters)) == len(letters), panel["title"]


def test_panels_do_not_overlap(dashboard):
    cells = {}
    for panel in dashboard["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24, panel["title"]
        columns = range(place["x"], place["x"] + place["w"])
        rows = range(place["y"], place["y"] + place["h"])
        for cell in itertools.product(columns, rows):
            assert cells.setdefault(cell, panel["title"]) == panel["title"]


def test_expressions_are_balanced_and_rates_follow_the_interval(dashboard):
    for written in expressions(dashboard):
        expression = re.sub(r'"[^"]*"', '""', written)
        for opening, closing in ("()", "[]", "{}"):
            assert expression.count(opening) == expression.count(closing), written
        ranges = re.findall(r"\[([^]]*)\]", expression)
        assert all(found == "$__rate_interval" for found in ranges), written
        assert len(ranges) == len(re.findall(r"\b(?:rate|increase)\(", expression)), written
        assert "${" not in expression, written


def test_metrics_follow_the_naming_rules(dashboard):
    for expression in expressions(dashboard):
        for name in re.findall(r"([a-zA-Z_]\w*)\s*\{", expression):
            assert name in OWN_NAMES or name.startswith(("model_", "appliance_", "node_", "prometheus_")), expression
