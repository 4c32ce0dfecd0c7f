"""The dashboards that the role grafana ships: what can be said about them without a Grafana and without a host.

Whether promtool understands each expression, and whether it has an answer, is checked where there is a Prometheus: on a
provisioned host (molecule/grafana/tests).
"""

import itertools
import json
import re
from pathlib import Path

import pytest
import yaml
from model_server.protocols import prediction_routes

from roles.grafana.dashboards import __main__ as generator
from roles.grafana.dashboards.builder import Dashboard, Query, Row, stat, timeseries
from roles.grafana.dashboards.promql import PREDICTIONS
from tests.unit.exported import declared, known, matchers, metrics, unknown_labels, without_strings

ROOT = Path(__file__).resolve().parents[2]
DASHBOARDS = sorted((ROOT / "roles/grafana/files/dashboards").glob("*.json"))
EXPECTED = {f"appliance-{name}" for name in ("overview", "serving", "colours", "drift", "host", "edge", "monitoring")}
PANEL_TYPES = {"timeseries", "stat", "bargauge", "table", "heatmap", "state-timeline", "row"}
DATASOURCE = {"type": "prometheus", "uid": "prometheus"}
GRAFANA_OWN = {"__rate_interval"}


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def data_panels(dashboard):
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def expressions(dashboard):
    targets = [target for panel in data_panels(dashboard) for target in panel["targets"]]
    return [entry["expr"] for entry in targets + dashboard["annotations"]["list"]]


@pytest.fixture(params=DASHBOARDS, ids=lambda path: path.stem)
def dashboard(request):
    return load(request.param)


def test_every_dashboard_is_there_and_provisioned():
    assert {path.stem for path in DASHBOARDS} == EXPECTED
    provisioned = yaml.safe_load((ROOT / "roles/grafana/defaults/main.yml").read_text())["grafana_dashboards"]
    assert {Path(entry).stem for entry in provisioned} == EXPECTED


def test_the_files_are_what_the_modules_say(capsys):
    assert generator.main(["--check"]) == 0, capsys.readouterr().err


def test_a_file_that_was_changed_by_hand_is_noticed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generator, "DIRECTORY", tmp_path)
    assert generator.main([]) == 0
    assert {path.stem for path in tmp_path.glob("*.json")} == EXPECTED
    changed, stray = tmp_path / "appliance-host.json", tmp_path / "stray.json"
    changed.write_text(changed.read_text().replace('"Host"', '"Hosts"'))
    stray.write_text("{}")
    assert generator.main(["--check"]) == 1
    assert capsys.readouterr().err.count("python3 -m roles.grafana.dashboards") == 2
    assert generator.main([]) == 0
    assert generator.main(["--check"]) == 0 and not stray.exists()


def test_panels_fill_the_width_and_then_go_below():
    panels = [stat(f"{index}", "What it is for.", "short", Query("up"), width=10, height=4) for index in range(3)]
    wide = timeseries("wide", "What it is for.", "short", Query("up"), width=24)
    placed = Dashboard("uid", "Title", "Text", [Row("One", panels), Row("Two", [wide])]).model()["panels"]
    places = [(panel["title"], panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in placed]
    assert places == [("One", 0, 0), ("0", 0, 1), ("1", 10, 1), ("2", 0, 5), ("Two", 0, 9), ("wide", 0, 10)]
    assert [panel["id"] for panel in placed] == [1, 2, 3, 4, 5, 6]


def test_file_is_named_after_the_uid():
    assert [load(path)["uid"] for path in DASHBOARDS] == [path.stem for path in DASHBOARDS]


def test_uids_and_titles_are_unique():
    models = [load(path) for path in DASHBOARDS]
    assert len({model["uid"] for model in models}) == len(models)
    assert len({model["title"] for model in models}) == len(models)


def test_dashboard_is_a_raw_model(dashboard):
    assert re.fullmatch(r"[a-z0-9-]{1,40}", dashboard["uid"])
    assert dashboard["id"] is None
    assert dashboard["schemaVersion"] == 41
    assert dashboard["description"]
    assert not {"__inputs", "__requires", "__elements"} & set(dashboard)


def test_the_first_row_says_whether_it_is_ok(dashboard):
    first, *others = dashboard["panels"]
    assert first["type"] == "row" and first["title"] == "Is it OK?"
    answers = list(itertools.takewhile(lambda panel: panel["type"] != "row", others))
    assert len(answers) >= 5
    assert {panel["type"] for panel in answers} == {"stat"}
    assert len({panel["gridPos"]["y"] for panel in answers}) == 1


def test_panel_ids_and_titles_are_unique(dashboard):
    for values in (
        [panel["id"] for panel in dashboard["panels"]],
        [panel["title"] for panel in data_panels(dashboard)],
    ):
        assert len(set(values)) == len(values), values


def test_panels_are_explained(dashboard):
    for panel in data_panels(dashboard):
        assert panel["type"] in PANEL_TYPES, panel["title"]
        assert panel["title"]
        assert len(panel["description"]) > 20 and panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]


def test_everything_asks_the_provisioned_data_source(dashboard):
    for entry in dashboard["annotations"]["list"] + dashboard["templating"]["list"]:
        assert entry["datasource"] == DATASOURCE
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
            assert cells.setdefault(cell, panel["id"]) == panel["id"], panel["title"]


def test_releases_and_pages_are_marked_in_every_dashboard(dashboard):
    marks = {entry["name"]: entry for entry in dashboard["annotations"]["list"]}
    assert set(marks) == {"Alerts that page", "Switches", "Rollbacks", "Releases"}
    assert all(entry["enable"] for entry in marks.values())
    # The value is a time in milliseconds, or every switch would stand where the query's step does.
    assert marks["Switches"]["useValueForTime"] and marks["Switches"]["expr"].startswith("1000 * ")


def test_variables_are_offered_and_used(dashboard):
    offered = {variable["name"] for variable in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", " ".join(expressions(dashboard)))) - GRAFANA_OWN
    # A dollar sign and a number is what a group of label_replace matched.
    assert {name for name in used if not name.isdigit()} == offered


def test_expressions_are_balanced_and_rates_follow_the_interval(dashboard):
    for written in expressions(dashboard):
        expression = without_strings(written)
        for opening, closing in ("()", "[]", "{}"):
            assert expression.count(opening) == expression.count(closing), written
        rates = re.findall(r"\bi?rate\(\s*[\w:]+(?:\{[^}]*\})?(\[[^]]*\])?", expression)
        assert set(rates) <= {"[$__rate_interval]"}, written


def test_names_of_an_expression_are_found():
    assert metrics('sum by (a) (rate(b_total{c="d_e"}[5m])) / on (f) group_left() (g:h > 0) or i offset 1m') == {
        *("b_total", "g:h", "i"),
    }
    assert matchers('x{a="b", c!~"d|e{1}"} + y') == [("x", {"a", "c"})]
    assert declared("x_total{a,b} or `y`")["x_total"] == {"a", "b"}


def test_all_routes_that_predict_count_as_predictions_and_no_others():
    methods, paths = (re.compile(pattern) for pattern in re.findall(r'=~"([^"]*)"', PREDICTIONS))
    for route in prediction_routes(models=None):
        assert methods.fullmatch(route.method) and paths.fullmatch(route.rule), route
    jobs = ("/v1/jobs", "/v1/model/<name>/jobs", "/v1/jobs/<job_id>/cancel")
    for path in (*jobs, "/health", "/metrics", "/v2/repository/index", "other"):
        assert not paths.fullmatch(path), path
    assert not methods.fullmatch("GET")


def test_a_dashboard_asks_for_all_routes_that_predict(dashboard):
    for expression in expressions(dashboard):
        assert not re.search(r'path="|http_requests_total(?!\{)', expression), expression


def test_every_metric_exists(dashboard):
    asked = {name for expression in expressions(dashboard) for name in metrics(expression)}
    asked |= {entry["definition"].split("(")[1].split(",")[0] for entry in dashboard["templating"]["list"]}
    assert asked - set(known()) == set()


def test_every_label_exists(dashboard):
    for expression in expressions(dashboard):
        assert unknown_labels(expression) == set(), expression
